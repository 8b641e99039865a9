"""How does the configuration of another tool, its YAML file or its flags, become our keys?

A tool is a table: the keys that map to ours, the keys of which only one value describes what happens here, and the keys
that change no result. A key outside the table that is not a field of TrainingArguments either is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.dialect_defaults import default_layer
from qwenvl_ft.recipe.dialect_marks import dialect_of
from qwenvl_ft.recipe.dialects import ALIASES, flag_values
from qwenvl_ft.recipe.keys import type_of
from qwenvl_ft.recipe.layers import Layer, read_file, read_layers
from qwenvl_ft.recipe.schema import SECTIONS
from qwenvl_ft.recipe.values import NULLS, convert, shown

Values = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A key of another tool, with the keys around it, which may change its meaning."""

    value: Any
    """Its value: text, if it comes from a flag."""
    around: Values
    """All keys that were given -> value."""
    where: str
    """File or flag, for messages."""

    @property
    def yes(self) -> bool:
        """The value as a boolean."""
        return bool(convert(self.value, bool, self.where))

    def other(self, key: str, default: Any) -> Any:
        """Return another key of the configuration, or the tool's default, as the default's type."""
        value = self.around.get(key)
        return default if is_null(value) else convert(value, type(default), f"{self.where}: {key}")

    def refuse(self, why: str) -> RecipeError:
        """Return the error for a value that cannot be honoured."""
        return RecipeError(f"{self.where}: {shown(self.value)} {why}")


Meaning = Callable[[Entry], Values]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """The keys of another tool."""

    names: dict[str, str | Meaning]
    """Their key -> our key with the same value, or the function that returns our keys and values."""
    only: dict[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    """Their key -> values that describe what happens here, and why others are refused."""
    irrelevant: tuple[str, ...] = ()
    """Keys that change no result here; ``*`` at the end stands for any ending."""
    joint: Callable[[Values, str], Values] | None = None
    """Function of all keys together, for those that only have a meaning together."""
    joint_keys: tuple[str, ...] = ()
    """Keys that ``joint`` reads."""

    def knows(self, key: str) -> bool:
        """Return True if the table has a key."""
        return key in self.names or key in self.only or key in self.joint_keys or self.is_irrelevant(key)

    def is_irrelevant(self, key: str) -> bool:
        """Return True if a key changes no result."""
        return any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in self.irrelevant)


def is_null(value: Any) -> bool:
    """Return True if a key is given without a value."""
    return value is None or value in ("", *NULLS)


def translated(tool: Tool, name: str, theirs: Values, where: str) -> Values:
    """Return our dotted keys and values for a tool's configuration.

    Raises:
        RecipeError: a key is unknown, or a value cannot be honoured.
    """
    ours: Values = tool.joint(theirs, where) if tool.joint else {}
    for key, value in theirs.items():
        at = f"{where}: {key}"
        if key in tool.joint_keys:
            continue
        if key in tool.only:
            accepted, why = tool.only[key]
            if not (is_null(value) or any(_equal(value, one) for one in accepted)):
                raise RecipeError(f"{at}: {shown(value)} cannot be honoured: {why}")
        elif key in tool.names:
            target = tool.names[key]
            if is_null(value):
                continue
            ours |= {target: value} if isinstance(target, str) else target(Entry(value, theirs, at))
        elif tool.is_irrelevant(key):
            continue
        elif key in ALIASES:
            ours |= flag_values(key, value, at)
        elif type_of(f"training.{key}") is not None:
            ours[f"training.{key}"] = value
        else:
            raise RecipeError(f"{at}: {name} has no such key.{hint(key, [*tool.names, *tool.only])}")
    return ours


def _equal(value: Any, accepted: Any) -> bool:
    """Return True if a value, which may be text, is an accepted one."""
    return value == accepted or str(value).lower() == str(accepted).lower()


def file_layers(path: Path, *, own: bool = True) -> list[Layer]:
    """Return the layers of a file: a recipe with its bases, or another tool's file over the defaults of that tool.

    Args:
        own: as `Layer.own`.
    """
    from qwenvl_ft.recipe.tools import TOOLS

    values = read_file(path)
    name = dialect_of(values)
    if name not in TOOLS or any(isinstance(values.get(section), dict) for section in SECTIONS):
        return read_layers(path, own=own)
    layer = Layer(str(path), own=own)
    for key, value in translated(TOOLS[name], name, values, str(path)).items():
        layer.set(key, value, key)
    return [default_layer(name, values, [layer]), layer]
