"""Finds recipe files and reads each into a layer, with aliases replaced by our keys: a file and those it extends."""

import os
import re
import sys
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.dialects import ENVIRONMENT, alias_in, flag_values
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.schema import SECTIONS, TOP_LEVEL
from qwenvl_ft.recipe.values import parse_text, shown

Values = dict[str, Any]
OVERRIDE = "override"
ENVIRONMENT_LAYER = "environment"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".yaml", ".yml")
PHASE_EXAMPLE = (
    "Example: phases: [{name: simple, data: {train: simple.jsonl}}, {name: full, data: {train: all.jsonl}}]."
)
FIRST_PHASE = "applies to the first phase only, since each phase continues from the one before. Set it outside phases."
ONE_FOR_ALL = "applies to all phases together. Set it outside phases."
RUN_KEYS = {
    "model.model": FIRST_PHASE,
    "tuner.resume_from_checkpoint": FIRST_PHASE,
    "training.output_dir": f"{ONE_FOR_ALL} Each phase gets a folder in it.",
    "training.resume_from_checkpoint": ONE_FOR_ALL,
    "training.resume_weights_only": ONE_FOR_ALL,
    "training.save_final": ONE_FOR_ALL,
}
"""Key that a phase cannot set -> the reason, for the error message."""
DOTTED = ("model.device_map",)
"""Mappings whose own keys contain dots."""


@dataclass
class Layer:
    """The settings of one file, or of the command line."""

    where: str
    """The file, or ``override``."""
    values: Values = field(default_factory=dict)
    """Section -> key -> value, under our own names."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Dotted key -> the alias that set it, if one did."""
    settings: "dict[str, list[tuple[str, Any]]]" = field(default_factory=dict)
    """Dotted key -> each spelling that set it, with its value; `exclusive.settle` chooses among them."""
    own: bool = False
    """True for the recipe itself, and for a phase in it, unlike the files that it extends."""
    phases: "dict[str, Layer] | None" = None
    """Name -> layer of a phase; None without ``phases``. A file defines all phases, overrides change some of them."""

    @property
    def repeats(self) -> bool:
        """True for a command line, where a setting may be repeated under the same name, and the last one counts."""
        return self.where.startswith(OVERRIDE)

    def set(self, key: str, value: Any, spelled: str) -> None:
        """Set a dotted key to a value. If several settings of a layer set it, `exclusive.settle` chooses one."""
        self.settings.setdefault(key, []).append((spelled, value))
        self.choose(key, spelled, value)

    def choose(self, key: str, spelled: str, value: Any) -> None:
        """Give a dotted key the value of one of its settings."""
        *parents, last = _steps(key)
        values = self.values
        for parent in parents:
            if not isinstance(values.get(parent), dict):
                values[parent] = {}
            values = values[parent]
        values[last] = value
        self.spelled.pop(key, None)
        if spelled != key:
            self.spelled[key] = spelled

    def get(self, key: str) -> Any:
        """Return the value of a dotted key that this layer sets."""
        value: Any = self.values
        for step in _steps(key):
            value = value[step]
        return value

    def with_values(self, values: Values, spelled: str) -> "Layer":
        """Return a copy in which dotted keys have other values, all set by one spelling."""
        copied = replace(self, values=deepcopy(self.values), spelled=dict(self.spelled), settings=dict(self.settings))
        for key, value in values.items():
            copied.settings[key] = []
            copied.set(key, value, spelled)
        return copied

    def put(self, section: str, name: str, value: Any) -> None:
        """Set ``section.name``, where the name is a key or an alias."""
        spelled = f"{section}.{name}"
        section = "data" if section == "custom" else section
        alias = alias_in(section, name)
        if alias is None:
            self.set(f"{section}.{name}", value, spelled)
            return
        for key, converted in alias.meaning(value, f"{self.where}: {spelled}").items():
            self.set(key, converted, spelled)


def _steps(key: str) -> list[str]:
    """Split a dotted key into the keys of nested mappings."""
    for mapping in DOTTED:
        if key.startswith(f"{mapping}."):
            return [*mapping.split("."), key.removeprefix(f"{mapping}.")]
    return key.split(".")


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe: a path as given, or a name looked up in `recipe_folders`.

    Raises:
        RecipeError: the file does not exist.
    """
    path = Path(name_or_path).expanduser()
    if not path.name:
        raise RecipeError(f"recipe={name_or_path} names no recipe. Example: recipe=lora_4b.")
    bare = len(path.parts) == 1
    candidates = [path] if path.suffix in SUFFIXES or not bare else []
    folders = recipe_folders() if bare else [Path()]
    candidates += [folder / name for folder in folders for name in (path.name, f"{path.name}.yaml")] if bare else []
    candidates += [] if bare else [path.with_name(f"{path.name}.yaml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not bare:
        raise RecipeError(f"recipe {name_or_path}: there is no such file.")
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise RecipeError(f"there is no recipe {str(name_or_path)!r}.{hint(path.stem, known)}")


def recipe_folders() -> list[Path]:
    """Return the folders that are searched for a recipe's name, in order: ./recipes, beside the package, installed."""
    return [Path("recipes"), PACKAGE_ROOT / "recipes", Path(sys.prefix) / "share" / "qwenvl_ft" / "recipes"]


def read_layers(path: Path, chain: tuple[Path, ...] = (), *, own: bool = True) -> list[Layer]:
    """Return the layers of a file's bases and of the file itself, the weakest first.

    A base counts as a whole: with ``extends: [a, b]`` all that ``b`` sets or inherits overrides ``a``.

    Raises:
        RecipeError: a base is missing, or the files extend each other in a circle; the message shows the chain.
    """
    real = path.resolve()
    if real in chain:
        shown = " -> ".join(str(entry) for entry in (*chain[chain.index(real) :], real))
        raise RecipeError(f"{path}: recipes extend each other in a circle: {shown}.")
    values = read_file(path)
    layers: list[Layer] = []
    for base in _bases(path, values):
        layers += read_layers(base, (*chain, real), own=False)
    return [*layers, _layer(str(path), values, own)]


def _bases(path: Path, values: Values) -> list[Path]:
    """Remove ``extends`` from ``values`` and return the files that it names."""
    lists = [values.pop(key) for key in ("extends", "inherit") if key in values]
    if len(lists) > 1:
        raise RecipeError(f"{path}: both extends and inherit are set. Keep extends.")
    names = lists[0] if lists and lists[0] is not None else []
    bases: list[Path] = []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str):
            raise RecipeError(
                f"{path}: extends: {name!r} is not a file name. Example: extends: [base.yaml, mine.yaml]."
            )
        base = path.parent / Path(name).expanduser()
        if not base.is_file():
            raise RecipeError(f"{path}: extends: there is no {base}.{_elsewhere(path, base)}")
        bases.append(base)
    return bases


def _elsewhere(path: Path, missing: Path) -> str:
    """Return a hint where a missing base may be."""
    for folder in recipe_folders():
        shipped = folder / missing.name
        if shipped.is_file():
            return f" Did you mean {shipped.resolve()}? Paths start at the folder of {path.name}."
    known = [file.name for file in missing.parent.glob("*.yaml") if file.name != path.name]
    close = hint(missing.name, known).split(" Known:")[0]
    return f"{close} Paths start at the folder of {path.name}."


def read_file(path: Path) -> Values:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: the file is not valid YAML (the message names the line), or holds no mapping.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: not valid YAML: {problem}.") from None
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, OSError) or error.errno is not None:
            raise RecipeError(f"{path}: cannot be read: {error}.") from None
        loaded = None  # OmegaConf raises OSError without errno for a file that holds one bare word
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections: {', '.join(SECTIONS)}.")
    return {str(key): value for key, value in loaded.items()}


def _layer(where: str, values: Values, own: bool) -> Layer:
    """Turn the values of a file into a layer, with aliases replaced by our keys; an unknown section is an error."""
    layer = Layer(where, own=own)
    for section, content in values.items():
        if section not in TOP_LEVEL:
            raise RecipeError(f"{where}: unknown section {section!r}.{_section_hint(section)}")
        if section == "global_max_length":
            layer.set(section, content, section)
        elif section == "phases":
            layer.phases = _phases(where, content)
        elif isinstance(content, dict):
            for name, value in content.items():
                layer.put(section, str(name), value)
        elif content is not None:
            raise RecipeError(f"{where}: {section} is {shown(content)}, but a section is a mapping of keys.")
    return layer


def _phases(where: str, content: Any) -> dict[str, Layer]:
    """Return the phases of a file in order. A phase without a name is named by its number."""
    if content is None:
        return {}
    if not isinstance(content, list):
        raise RecipeError(f"{where}: phases is {shown(content)}, but it is a list. {PHASE_EXAMPLE}")
    phases: dict[str, Layer] = {}
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise RecipeError(f"{where}: phase {number} is {shown(entry)}, not a mapping of sections. {PHASE_EXAMPLE}")
        values = {str(key): value for key, value in entry.items()}
        name = str(values.pop("name", number))
        label = f"{where}: phase {number}" + (f" ({name})" if name != str(number) else "")
        if not re.fullmatch(r"[A-Za-z]\w*|\d+", name) or (name.isdigit() and name != str(number)):
            raise RecipeError(
                f"{label}: a name begins with a letter, followed by letters, digits and _, for example medium."
            )
        if name in phases:
            raise RecipeError(f"{label}: another phase has that name. Use different names.")
        for key in ("extends", "inherit", "phases"):
            if key in values:
                raise RecipeError(f"{label}: {key} belongs at the top of a recipe, not in a phase.")
        phases[name] = _layer(label, values, own=True)
        _require_own_run(phases[name])
    return phases


def _require_own_run(layer: Layer) -> None:
    """Raise RecipeError if a phase sets a key that belongs to the whole run."""
    for key, why in RUN_KEYS.items():
        section, _, name = key.partition(".")
        if section in layer.values and name in layer.values[section]:
            raise RecipeError(f"{layer.where}: {key} {why}")


def _section_hint(name: str) -> str:
    """Return a suggestion for an unknown section, which may be a key that lacks its section."""
    homes = [section for section in SECTIONS if name in own_types(section)]
    return f" Did you mean {homes[0]}.{name}?" if homes else hint(name, TOP_LEVEL)


def environment_layer() -> Layer:
    """Return the layer of other tools' environment variables (`ENVIRONMENT`)."""
    layer = Layer(ENVIRONMENT_LAYER)
    for variable, name in ENVIRONMENT.items():
        if os.environ.get(variable):
            for key, value in flag_values(name, os.environ[variable], f"{layer.where}: {variable}").items():
                layer.set(key, value, variable)
    return layer


def override_layer(overrides: Iterable[str]) -> Layer:
    """Return the layer of overrides ``section.key=value``.

    Raises:
        RecipeError: an entry does not have this form, or its section is unknown.
    """
    layer = Layer(OVERRIDE)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r} is not section.key=value. Example: training.learning_rate=1e-5.")
        set_override(layer, key, text)
    return layer


def _inside(section: str, name: str) -> str:
    """Return the dotted key inside a mapping, whose name may be an alias."""
    section = "data" if section == "custom" else section
    mapping, _, inner = name.partition(".")
    alias = alias_in(section, mapping)
    return f"{section}.{name}" if alias is None or alias.kind is not None else f"{alias.keys[0]}.{inner}"


def set_override(layer: Layer, key: str, value: Any) -> None:
    """Set one dotted key from the command line. Text is converted later, by the type of the key."""
    section, dot, name = key.partition(".")
    if key == "global_max_length":
        layer.set(key, value, key)
    elif section == "phases":
        _override_phase(layer, name, value, key)
    elif key in ("extends", "inherit"):
        raise RecipeError(f"{OVERRIDE}: {key} belongs in a file. On the command line, use base_config={value}.")
    elif section not in (*SECTIONS, "custom"):
        raise RecipeError(f"{OVERRIDE}: unknown key {key!r}.{_section_hint(section)}")
    elif not dot:
        raise RecipeError(f"{OVERRIDE}: {section} is a section. Set one of its keys: {section}.key=value.")
    elif "." in name:  # inside a mapping, whose values have no type
        layer.set(_inside(section, name), parse_text(value) if isinstance(value, str) else value, key)
    else:
        layer.put(section, name, value)


def _override_phase(layer: Layer, name: str, value: Any, spelled: str) -> None:
    """Set ``phases.NAME.section.key`` from the command line."""
    phase, _, key = name.partition(".")
    if not key:
        raise RecipeError(
            f"{OVERRIDE}: {spelled} is not phases.NAME.section.key=value. Example: "
            "phases.simple.training.learning_rate=1e-5. Phases are defined in a file."
        )
    layer.phases = layer.phases or {}
    inner = layer.phases.setdefault(phase, Layer(f"{OVERRIDE}: phases.{phase}"))
    set_override(inner, key, value)
    _require_own_run(inner)
