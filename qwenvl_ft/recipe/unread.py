"""Which settings does a run not read? Names those that its user gave, and resets those meant for other runs.

A setting that is not read (`read_if`) is an error if the recipe itself or the command line gives it, because its user
expects an effect. It falls away if it comes from a base file, or if a stronger layer set the key that leaves it unread:
then it was meant for other runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.read_if import READ_IF, ReadIf
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECRETS, SECTIONS, Recipe
from qwenvl_ft.recipe.values import shown

if TYPE_CHECKING:
    from qwenvl_ft.recipe.layers import Layer


def leave_out_unread(recipe: Recipe, layers: list[Layer]) -> dict[str, str]:
    """Reset the keys that a run does not read, and return the error message of each that its user expects to be read.

    Args:
        layers: the weakest first. The user expects those of a command line and those with `Layer.own` to be read;
            others serve other runs too.
    """
    order = {layer.where: number for number, layer in enumerate(layers)}
    own = {layer.where for layer in layers if layer.own or layer.repeats}
    messages: dict[str, str] = {}
    for entry in READ_IF:
        given = [key for key in entry.keys if key in recipe.origins and value_in(recipe, key) != default_of(key)]
        if not given or entry.when(recipe):
            continue
        deciding = [order[recipe.origins[key]] for key in entry.by if key in recipe.origins]
        for key in given:
            where = recipe.origins[key]
            if where in own and order[where] >= max(deciding, default=-1):
                names = layers[order[where]].spelled
                messages[key] = f"{where}: {_message(recipe, key, entry, names[key] if key in names else key)}"
            _reset(recipe, key)
    return messages


def _message(recipe: Recipe, key: str, entry: ReadIf, spelled: str) -> str:
    setting = key if key.partition(".")[2] in SECRETS else f"{key}={shown(value_in(recipe, key))}"
    setting = setting if spelled == key else f"{spelled} ({setting})"
    decided = value_in(recipe, entry.by[0])
    written = decided if isinstance(decided, str) else shown(decided)
    return f"{setting} is not read with {entry.by[0]}={written}. Remove {spelled}, or {entry.fix}."


def value_in(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key in a recipe."""
    section, _, name = key.partition(".")
    if name in own_types(section):
        return getattr(getattr(recipe, section), name)
    arguments = recipe.training.arguments
    return arguments[name] if name in arguments else default_of(key)


def default_of(key: str) -> Any:
    """Return the value of a dotted key that no layer sets."""
    section, _, name = key.partition(".")
    if name in own_types(section):
        return getattr(SECTIONS[section](), name)
    return HF_DEFAULTS[name] if name in HF_DEFAULTS else _default_of_transformers(name)


def _default_of_transformers(name: str) -> Any:
    from qwenvl_ft.upstream.arguments import default_value

    return default_value(name)


def _reset(recipe: Recipe, key: str) -> None:
    """Give a key its default, as if no layer had set it."""
    section, _, name = key.partition(".")
    if name in own_types(section):
        setattr(getattr(recipe, section), name, default_of(key))
    elif name in HF_DEFAULTS:
        recipe.training.arguments[name] = HF_DEFAULTS[name]
    else:
        recipe.training.arguments.pop(name, None)
    for gone in [other for other in recipe.origins if other == key or other.startswith(f"{key}.")]:
        del recipe.origins[gone]
