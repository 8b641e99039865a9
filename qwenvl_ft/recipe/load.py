"""Loads a recipe: merges its file, the files that it extends and the overrides into one typed and checked `Recipe`.

Precedence, the weakest first: defaults, each base file in turn, the file itself, environment variables, overrides.
Mappings are merged key by key. Nothing is written to disk.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint, unknown_name
from qwenvl_ft.recipe.checks import check
from qwenvl_ft.recipe.dialects import REMOVED, is_same_anyway
from qwenvl_ft.recipe.exclusive import outweighed, set_lengths, settle
from qwenvl_ft.recipe.foreign import file_layers
from qwenvl_ft.recipe.keys import LENGTH, argument_types, own_types
from qwenvl_ft.recipe.layers import (
    ENVIRONMENT_LAYER,
    OVERRIDE,
    Layer,
    Values,
    environment_layer,
    find_recipe,
    override_layer,
)
from qwenvl_ft.recipe.layers import recipe_folders as recipe_folders
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS, Recipe
from qwenvl_ft.recipe.unread import leave_out_unread
from qwenvl_ft.recipe.values import convert

Messages = dict[str, str]
"""Key -> the error message for it."""


def load_recipe(name_or_path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe from a file and overrides.

    Args:
        name_or_path: a file, or the name of one in ``recipes/``; None for the defaults alone.
        overrides: ``section.key=value``, the value written as in YAML.

    Raises:
        RecipeError: a file is missing or malformed, a key is unknown, or a value is wrong. The message is one line that
            names file, key and value.
    """
    layers = file_layers(find_recipe(name_or_path)) if name_or_path else []
    return build_recipe([*layers, environment_layer(), override_layer(overrides)])


def build_recipe(layers: list[Layer]) -> Recipe:
    """Merge layers into a checked recipe, and with phases into one recipe for each of them."""
    recipe, unread = _typed(layers)
    by_layer = {layer.where: layer.phases for layer in layers if layer.phases is not None}
    changes = by_layer.pop(OVERRIDE, {})
    phases = list(by_layer.values())[-1] if by_layer else {}
    for name in changes:
        if name not in phases:
            raise unknown_name("phase", name, phases)
    for number, (name, phase) in enumerate(phases.items(), 1):
        own = [phase, *([changes[name]] if name in changes else [])]
        run, unread_here = _phase(layers, own, f"{number}/{len(phases)} {name}")
        recipe.phases.append(run)
        unread = unread_here if number == 1 else {key: unread[key] for key in unread if key in unread_here}
    if not phases:
        check(recipe)
    if unread:
        raise RecipeError(next(iter(unread.values())))
    return recipe


def _phase(layers: list[Layer], own: list[Layer], title: str) -> tuple[Recipe, Messages]:
    """Return the recipe of a phase, and what it does not read of the settings that all phases share.

    Args:
        own: the phase's own layers: stronger than all files but weaker than environment variables and overrides, and
            the overrides of this phase.
    """
    name = title.split()[1]
    strong = [layer for layer in layers if layer.where in (ENVIRONMENT_LAYER, OVERRIDE)]
    weak = [layer for layer in layers if layer not in strong]
    recipe, unread = _typed([*weak, own[0], *strong, *own[1:]])
    recipe.phase = title
    training = recipe.training
    folder = f"phase_{title.split('/')[0]}" + ("" if name.isdigit() else f"_{name}")
    training.arguments["output_dir"] = str(Path(training.arguments["output_dir"]) / folder)
    training.logging_dir = training.logging_dir and str(Path(training.logging_dir) / folder)
    mine = [message for message in unread.values() if message.startswith(tuple(f"{layer.where}: " for layer in own))]
    try:
        check(recipe)
        if mine:
            raise RecipeError(mine[0])
    except RecipeError as error:
        raise RecipeError(f"phase {title}: {error}") from None
    return recipe, unread


def _typed(layers: list[Layer]) -> tuple[Recipe, Messages]:
    """Merge layers, resolve interpolations and convert every value to its type.

    Returns:
        The recipe, and the keys that their layer expects to be read although nothing reads them.
    """
    merged: Values = {}
    origins: dict[str, str] = {}
    spelled: dict[tuple[str, str], str] = {}
    for layer in layers:
        settle(layer)
    for layer in set_lengths(layers):
        lost = outweighed(layer)
        _remove(lost, merged, origins)
        merged = _merge(merged, layer.values, layer.where, origins)
        _remove([key for key in lost if key in layer.settings], merged, origins)
        spelled |= {(layer.where, key): name for key, name in layer.spelled.items()}
    merged = _resolved(merged, origins)
    places = _Places(origins, spelled)
    length = merged.pop("global_max_length", None)
    if length is not None:
        length = convert(length, LENGTH, places["global_max_length"])
    sections = {name: _section(name, merged[name] if name in merged else {}, places) for name in SECTIONS}
    recipe = Recipe(**sections, origins=origins)
    if length == recipe.model.max_model_len == recipe.template.max_length:
        recipe.global_max_length = length
    _derive(recipe)
    return recipe, leave_out_unread(recipe, layers)


def _remove(keys: list[str], merged: Values, origins: dict[str, str]) -> None:
    """Remove dotted keys from merged values, as if no layer had set them."""
    for key in keys:
        section, _, name = key.partition(".")
        if section in merged and name in merged[section]:
            merged[section] = {other: value for other, value in merged[section].items() if other != name}
        for gone in [other for other in origins if other == key or other.startswith(f"{key}.")]:
            del origins[gone]


class _Places:
    """``places["tuner.lora_rank"]`` is the file that set a key and the spelling used there, for error messages."""

    def __init__(self, origins: dict[str, str], spelled: dict[tuple[str, str], str]) -> None:
        self.origins, self.spelled = origins, spelled

    def __getitem__(self, key: str) -> str:
        layer = self.origins[key]
        return f"{layer}: {self.spelled[layer, key] if (layer, key) in self.spelled else key}"


def _merge(weak: Values, strong: Values, where: str, origins: dict[str, str], prefix: str = "") -> Values:
    """Merge ``strong`` over ``weak``, mappings key by key, and note in ``origins`` which layer set each key."""
    merged = dict(weak)
    for key, value in strong.items():
        name = f"{prefix}{key}"
        known = merged[key] if key in merged else None
        if isinstance(value, dict):
            merged[key] = _merge(known if isinstance(known, dict) else {}, value, where, origins, f"{name}.")
        else:
            merged[key] = value
            for stale in [inner for inner in origins if inner.startswith(f"{name}.")]:
                del origins[stale]
        if name not in SECTIONS:
            origins[name] = where
    return merged


def _resolved(merged: Values, origins: dict[str, str]) -> Values:
    """Replace the interpolations ``${section.key}`` and ``${oc.env:NAME}``; nothing in them is executed."""
    try:
        resolved: Values = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = full_key = str(getattr(error, "full_key", None) or "")
        while key and key not in origins:  # data.train[1]: the list has an origin
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        where = f"{origins[key]}: {full_key}" if key else "recipe"
        problem = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0]).strip('"')
        raise RecipeError(f"{where}: {problem}. A literal $ is written \\$.") from None
    return resolved


def _section(name: str, values: Values, places: _Places) -> Any:
    """Build the dataclass of a section from its values."""
    own = own_types(name)
    fields: Values = {}
    arguments: Values = dict(HF_DEFAULTS) if name == "training" else {}
    for key, value in values.items():
        where = places[f"{name}.{key}"]
        if key in own:
            fields[key] = convert(value, own[key], where)
        elif is_same_anyway(key, value, where):
            continue
        elif key in REMOVED:
            raise RecipeError(f"{where}: {REMOVED[key]}")
        elif name == "training":
            arguments[key] = _argument(key, value, where)
        else:
            raise RecipeError(f"{where}: unknown key.{hint(key, own)}")
    if name == "training":
        fields["arguments"] = arguments
    return SECTIONS[name](**fields)


def _argument(key: str, value: Any, where: str) -> Any:
    """Convert the value of a field of TrainingArguments to the type of its annotation there."""
    hints = argument_types()
    if key not in hints:
        close = hint(key, [*own_types("training"), *hints]).split(" Known:")[0]  # all of them would be too many
        raise RecipeError(f"{where}: unknown key.{close} docs/reference.md lists all keys.")
    return convert(value, hints[key], where)


def _derive(recipe: Recipe) -> None:
    """Set the defaults that follow from other keys."""
    arguments = recipe.training.arguments
    if recipe.model.max_model_len is not None and "template.max_length" not in recipe.origins:
        recipe.template.max_length = min(recipe.template.max_length, recipe.model.max_model_len)
    if recipe.data.evaluates and "training.eval_strategy" not in recipe.origins:
        arguments["eval_strategy"] = "steps"
    if arguments["eval_strategy"] == "steps":
        arguments.setdefault("eval_steps", arguments["save_steps"])
    best = arguments["save_strategy"] == "best" or arguments.get("load_best_model_at_end")
    if best or recipe.training.early_stopping_patience is not None:
        arguments.setdefault("metric_for_best_model", "eval_loss")
