"""A recipe's file, the files it extends and the overrides -> one checked Recipe that knows where each value came from.

Order: the defaults, then each base in turn, then the file itself, then overrides; the later wins, mappings are merged
key by key. Nothing is written.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint, unknown_name
from qwenvl_ft.recipe.checks import METHOD_KEYS, check
from qwenvl_ft.recipe.dialects import REMOVED
from qwenvl_ft.recipe.keys import LENGTH, argument_types, own_types
from qwenvl_ft.recipe.layers import (
    ENVIRONMENT_LAYER,
    OVERRIDE,
    Layer,
    Values,
    environment_layer,
    find_recipe,
    override_layer,
    read_layers,
)
from qwenvl_ft.recipe.layers import recipe_folders as recipe_folders
from qwenvl_ft.recipe.schema import (
    HF_DEFAULTS,
    SECTIONS,
    Recipe,
    TunerConfig,
)
from qwenvl_ft.recipe.values import convert


def load_recipe(name_or_path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe.

    Args:
        name_or_path: a file, or the name of one in ``recipes/``; None for the defaults alone.
        overrides: ``section.key=value``, the value as in YAML.

    Raises:
        RecipeError: a file is missing or malformed, a key is unknown, or a value is wrong; one line that names file,
            key and value.
    """
    layers = read_layers(find_recipe(name_or_path)) if name_or_path else []
    return build_recipe([*layers, environment_layer(), override_layer(overrides)])


def build_recipe(layers: list[Layer]) -> Recipe:
    """Merge, resolve interpolations, type and check; of a recipe with phases, each of them."""
    recipe = _typed(layers)
    told = {layer.where: layer.phases for layer in layers if layer.phases is not None}
    changes = told.pop(OVERRIDE, {})
    phases = list(told.values())[-1] if told else {}
    for name in changes:
        if name not in phases:
            raise unknown_name("phase", name, phases)
    for number, (name, phase) in enumerate(phases.items(), 1):
        recipe.phases.append(_phase(layers, phase, changes, f"{number}/{len(phases)} {name}"))
    if not phases:
        check(recipe)
    return recipe


def _phase(layers: list[Layer], phase: Layer, changes: dict[str, Layer], told: str) -> Recipe:
    """The recipe of a phase: it outweighs all files, and yields to the environment and the command line."""
    name = told.split()[1]
    strong = [layer for layer in layers if layer.where in (ENVIRONMENT_LAYER, OVERRIDE)]
    weak = [layer for layer in layers if layer not in strong]
    recipe = _typed([*weak, phase, *strong, *([changes[name]] if name in changes else [])])
    recipe.phase = told
    training = recipe.training
    folder = f"phase_{told.split('/')[0]}" + ("" if name.isdigit() else f"_{name}")
    training.arguments["output_dir"] = str(Path(training.arguments["output_dir"]) / folder)
    training.logging_dir = training.logging_dir and str(Path(training.logging_dir) / folder)
    try:
        check(recipe)
    except RecipeError as error:
        raise RecipeError(f"phase {told}: {error}") from None
    return recipe


def _typed(layers: list[Layer]) -> Recipe:
    """Merge, resolve interpolations and type."""
    merged: Values = {}
    origins: dict[str, str] = {}
    spelled: dict[tuple[str, str], str] = {}
    for layer in layers:
        merged = _merge(merged, layer.values, layer.where, origins)
        spelled |= {(layer.where, key): name for key, name in layer.spelled.items()}
    merged = _resolved(merged, origins)
    places = _Places(origins, spelled)
    length = merged.pop("global_max_length", None)
    if length is not None:
        length = convert(length, LENGTH, places["global_max_length"])
    if length is not None:
        for section, key in (("model", "max_model_len"), ("template", "max_length")):
            merged.setdefault(section, {})[key] = length
            origins[f"{section}.{key}"] = origins["global_max_length"]
    told = {name: _section(name, merged[name] if name in merged else {}, places) for name in SECTIONS}
    recipe = Recipe(**told, global_max_length=length, origins=origins)
    _derive(recipe)
    _drop_outweighed(recipe, [layer.where for layer in layers])
    return recipe


class _Places:
    """``places["tuner.lora_rank"]``: the file and the name that a value was given by, for messages."""

    def __init__(self, origins: dict[str, str], spelled: dict[tuple[str, str], str]) -> None:
        self.origins, self.spelled = origins, spelled

    def __getitem__(self, key: str) -> str:
        given = (self.origins[key], key)
        return f"{given[0]}: {self.spelled[given] if given in self.spelled else key}"


def _merge(weak: Values, strong: Values, where: str, origins: dict[str, str], prefix: str = "") -> Values:
    """``strong`` over ``weak``, mappings key by key; notes in ``origins`` who set what."""
    merged = dict(weak)
    for key, value in strong.items():
        name = f"{prefix}{key}"
        known = merged[key] if key in merged else None
        if isinstance(value, dict):
            merged[key] = _merge(known if isinstance(known, dict) else {}, value, where, origins, f"{name}.")
        else:
            merged[key] = value
            for stale in [told for told in origins if told.startswith(f"{name}.")]:
                del origins[stale]
        if name not in SECTIONS:
            origins[name] = where
    return merged


def _resolved(merged: Values, origins: dict[str, str]) -> Values:
    """Interpolations replaced: ``${section.key}`` and ``${oc.env:NAME}``; nothing in them is executed."""
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        key = told = str(getattr(error, "full_key", None) or "")
        while key and key not in origins:  # data.train[1]: the list has an origin
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        where = f"{origins[key]}: {told}" if key else "recipe"
        problem = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0]).strip('"')
        raise RecipeError(f"{where}: {problem}. A literal $ is written \\$.") from None
    return resolved


def _section(name: str, values: Values, places: _Places) -> Any:
    """A section's dataclass from its values."""
    own = own_types(name)
    told: Values = {}
    foreign: Values = dict(HF_DEFAULTS) if name == "training" else {}
    for key, value in values.items():
        where = places[f"{name}.{key}"]
        if key in own:
            told[key] = convert(value, own[key], where)
        elif name == "training":
            foreign[key] = _argument(key, value, where)
        else:
            raise RecipeError(f"{where}: unknown key.{hint(key, own)}")
    return SECTIONS[name](**told, arguments=foreign) if name == "training" else SECTIONS[name](**told)


def _argument(key: str, value: Any, where: str) -> Any:
    """A field of TrainingArguments, by its annotation there."""
    hints = argument_types()
    if key not in hints:
        if key in REMOVED:
            raise RecipeError(f"{where}: {REMOVED[key]}")
        close = hint(key, [*own_types("training"), *hints]).split(" Known:")[0]  # all of them would be too many
        raise RecipeError(f"{where}: unknown key.{close} docs/reference.md lists all keys.")
    return convert(value, hints[key], where)


def _derive(recipe: Recipe) -> None:
    """Defaults that follow from other keys."""
    told = recipe.training.arguments
    if recipe.model.max_model_len is not None and "template.max_length" not in recipe.origins:
        recipe.template.max_length = min(recipe.template.max_length, recipe.model.max_model_len)
    if recipe.data.evaluates and "training.eval_strategy" not in recipe.origins:
        told["eval_strategy"] = "steps"
    if told["eval_strategy"] == "steps":
        told.setdefault("eval_steps", told["save_steps"])
    best = told["save_strategy"] == "best" or ("load_best_model_at_end" in told and told["load_best_model_at_end"])
    if best or recipe.training.early_stopping_patience is not None:
        told.setdefault("metric_for_best_model", "eval_loss")


def _drop_outweighed(recipe: Recipe, order: list[str]) -> None:
    """Another ``train_type`` over a recipe takes the keys of the weaker one with it."""
    origins = recipe.origins
    if "tuner.train_type" not in origins:
        return
    strength = order.index(origins["tuner.train_type"])
    for name, readers in METHOD_KEYS.items():
        key = f"tuner.{name}"
        if recipe.tuner.train_type not in readers and key in origins and order.index(origins[key]) < strength:
            setattr(recipe.tuner, name, getattr(TunerConfig(), name))
            del origins[key]
