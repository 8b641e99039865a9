"""Full fine-tuning: the weights themselves train, as far as parts, names and shares leave them free."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.anatomy import FREEZE_FLAGS, current_name, family_of, part_of
from qwenvl_ft.tuning.freeze import frozen_parts
from qwenvl_ft.tuning.targets import inside, saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)

NUMBER_END = re.compile(r"((?:\d|\\d|\[[^\]]*\d[^\]]*\])(?:[+*?]|\{[^}]*\})?\)*[+*?]?)(?=\.|$)")
"""In a regular expression: the end of a number, before a dot that stands for anything or at the end."""


def build_full(model: nn.Module, tuner: TunerConfig) -> nn.Module:
    """Let the weights that ``tuner`` leaves free require a gradient, and no others.

    Set on parameters: ``requires_grad`` on a module changes nothing.

    Raises:
        RecipeError: a name or pattern that matches nothing, or more layers than there are.
    """
    free = free_weights(model, tuner)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in free)
    return model


def check_full(model: nn.Module, tuner: TunerConfig) -> None:
    """Refuse a model in which a weight would train that ``tuner`` freezes."""
    free = free_weights(model, tuner)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in free:
            part = part_of(name)
            cause = f"tuner.{FREEZE_FLAGS[part]}=true" if part in frozen_parts(tuner) else "it is frozen by name"
            raise RecipeError(
                f"{cause}, but {name} would train. Call prepare_model(model, recipe.tuner) before training."
            )


def free_weights(model: nn.Module, tuner: TunerConfig) -> set[str]:
    """Names of the weights that train: parts first, then what is frozen by share and name, then what trains anyway.

    A weight that two modules share, as a tied language head, has the name of the first and answers to both.
    """
    frozen, last = frozen_parts(tuner), _last_layers(model, tuner)
    free = {name for name, _ in model.named_parameters() if part_of(name) not in frozen or inside(name, last)}
    free -= _lowest(model, tuner.freeze_parameters_ratio)
    free -= _named(model, "freeze_parameters", tuner.freeze_parameters, tuner.freeze_parameters_regex)
    free |= _named(model, "trainable_parameters", tuner.trainable_parameters, tuner.trainable_parameters_regex)
    saved = saved_modules(model, tuner)
    return free | {weight for name, weight in _weights(model).items() if inside(name, saved)}


def _weights(model: nn.Module) -> dict[str, str]:
    """Every name of a weight -> its first."""
    first = {id(value): name for name, value in model.named_parameters()}
    return {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}


def _last_layers(model: Any, tuner: TunerConfig) -> list[str]:
    """Names of the layers that ``unfreeze_topk_llm`` and ``unfreeze_topk_vit`` let train in a frozen part."""
    family = family_of(model.config.model_type)
    names: list[str] = []
    for key, flag, stack in (
        ("unfreeze_topk_llm", "freeze_llm", family.text_layers),
        ("unfreeze_topk_vit", "freeze_vit", family.vision_blocks),
    ):
        count, layers = getattr(tuner, key), len(model.get_submodule(stack))
        if count and not getattr(tuner, flag):
            raise RecipeError(f"tuner.{key}={count} is read with tuner.{flag}=true; now all of that part trains.")
        if count > layers:
            raise RecipeError(f"tuner.{key}={count}, but {stack} has {layers} layers.")
        names += [f"{stack}.{index}" for index in range(layers - count, layers)]
    return names


def _lowest(model: nn.Module, share: float) -> set[str]:
    """The first weights, in the model's order from the pixels upwards, that together are at most ``share`` of all."""
    sizes = {name: getattr(value, "ds_numel", value.numel()) for name, value in model.named_parameters()}
    left, found = share * sum(sizes.values()), set()
    for name, size in sizes.items():
        left -= size
        if left < 0:
            break
        found.add(name)
    return found


def _named(model: nn.Module, key: str, begins: list[str], pattern: str | None) -> set[str]:
    """Names of the weights that a list of beginnings, or a pattern, means.

    Raises:
        RecipeError: one of them means none, or the pattern is no regular expression.
    """
    weights = _weights(model)
    found: set[str] = set()
    for begin in begins:
        hits = [name for name in weights if inside(name, [begin.rstrip("."), current_name(begin.rstrip("."))])]
        if not hits:
            depth = begin.count(".") + 1
            known = {".".join(spelt.split(".")[:depth]) for name in weights for spelt in _spellings(name)}
            raise RecipeError(f"tuner.{key} names {begin!r}, with which no weight's name begins.{hint(begin, known)}")
        found |= _tell_shared(key, begin, hits, weights)
    if pattern is not None:
        hits = _by_pattern(f"{key}_regex", pattern, weights)
        found |= _tell_shared(f"{key}_regex", pattern, hits, weights)
    return found


def _by_pattern(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Names in which the pattern is found. Numbers are whole: ``layers.[0-5].*`` does not mean layer 50."""
    try:
        compiled = re.compile(NUMBER_END.sub(r"\1(?!\\d)", pattern))
    except re.error as error:
        raise RecipeError(f"tuner.{key}={pattern!r} is not a regular expression: {error}.") from error
    names = list(names)
    hits = [name for name in names if any(compiled.search(spelt) for spelt in _spellings(name))]
    if not hits:
        raise RecipeError(f"tuner.{key}={pattern!r} is found in no weight's name. The last is {names[-1]}.")
    return hits


def _spellings(name: str) -> tuple[str, ...]:
    """A weight's name, and as guides write those of the language model: ``model.layers.0``."""
    short = name.replace("model.language_model.", "model.", 1)
    return (name,) if short == name else (name, short)


def _tell_shared(key: str, wanted: str, hits: list[str], weights: dict[str, str]) -> set[str]:
    """The weights behind the names; that one is shared with another module is said."""
    found = {weights[name] for name in hits}
    for name in hits:
        if weights[name] != name and weights[name] not in hits:
            logger.warning("tuner.%s %r: %s shares its weight with %s, which follows", key, wanted, name, weights[name])
    return found
