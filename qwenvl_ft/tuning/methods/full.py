"""Train type ``full``: the base weights train, except those frozen by part, by name or by share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.anatomy import FREEZE_FLAGS, current_name, family_of, part_of
from qwenvl_ft.tuning.freeze_flags import frozen_parts
from qwenvl_ft.tuning.targets import inside, saved_modules
from qwenvl_ft.upstream.whole import full_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)

NUMBER_END = re.compile(r"((?:\d|\\d|\[[^\]]*\d[^\]]*\])(?:[+*?]|\{[^}]*\})?\)*[+*?]?)(?=\.|$)")
"""Matches, within a regular expression, the end of a number that stands before a dot or at the end."""


def build_full(model: PreTrainedModel, tuner: TunerConfig) -> PreTrainedModel:
    """Make exactly the parameters that ``tuner`` selects trainable.

    ``requires_grad`` is set on each parameter, because setting it on a module has no effect.

    Raises:
        RecipeError: a name or pattern that matches nothing, or more layers than the model has.
    """
    free = free_weights(model, tuner)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in free)
    if tuner.freeze_parameters_ratio and free_weights(model, replace(tuner, freeze_parameters_ratio=0.0)) == free:
        logger.warning(
            "tuner.freeze_parameters_ratio=%g freezes nothing: the first weights of the model, which it counts, are "
            "frozen or trained by other keys, or are larger than that share. Raise it, or remove it.",
            tuner.freeze_parameters_ratio,
        )
    return model


def check_full(model: PreTrainedModel, tuner: TunerConfig) -> None:
    """Raise RecipeError if a parameter that ``tuner`` freezes is trainable."""
    free = free_weights(model, tuner)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in free:
            part = part_of(name)
            cause = f"tuner.{FREEZE_FLAGS[part]}=true" if part in frozen_parts(tuner) else "it is frozen by name"
            raise RecipeError(
                f"{cause}, but {name} would train. Call prepare_model(model, recipe.tuner) before training."
            )


def free_weights(model: PreTrainedModel, tuner: TunerConfig) -> set[str]:
    """Return the names of the trainable weights.

    Frozen parts come first, then ``freeze_parameters_ratio`` and ``freeze_parameters``, then the weights that train
    regardless of all these: ``trainable_parameters`` and ``modules_to_save``. A weight that two modules share, such as
    a tied language head, has the name in the first module and is matched by both names.
    """
    frozen, last = frozen_parts(tuner), _last_layers(model, tuner)
    free = {name for name, _ in model.named_parameters() if part_of(name) not in frozen or inside(name, last)}
    free -= _lowest(model, tuner.freeze_parameters_ratio)
    free -= _named(model, "freeze_parameters", tuner.freeze_parameters, tuner.freeze_parameters_regex)
    free |= _named(model, "trainable_parameters", tuner.trainable_parameters, tuner.trainable_parameters_regex)
    saved = saved_modules(model, tuner)
    return free | {weight for name, weight in _weights(model).items() if inside(name, saved)}


def _weights(model: nn.Module) -> dict[str, str]:
    """Return a map from every name of a weight to its first name."""
    first = {id(value): name for name, value in model.named_parameters()}
    return {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}


def _last_layers(model: PreTrainedModel, tuner: TunerConfig) -> list[str]:
    """Return the names of the layers that ``unfreeze_topk_llm`` and ``unfreeze_topk_vit`` unfreeze in a frozen part."""
    family = family_of(model.config.model_type)
    names: list[str] = []
    for key, flag, stack in (
        ("unfreeze_topk_llm", "freeze_llm", family.text_layers),
        ("unfreeze_topk_vit", "freeze_vit", family.vision_blocks),
    ):
        count, layers = getattr(tuner, key), len(list(model.get_submodule(stack).children()))
        if count and not getattr(tuner, flag):
            raise RecipeError(
                f"tuner.{key}={count} needs tuner.{flag}=true, but that part is not frozen. Set it, or remove "
                f"tuner.{key}."
            )
        if count > layers:
            raise RecipeError(f"tuner.{key}={count}, but {stack} has {layers} layers.")
        names += [f"{stack}.{index}" for index in range(layers - count, layers)]
    return names


def _lowest(model: nn.Module, share: float) -> set[str]:
    """Return the names of the first weights in the model's order, together at most ``share`` of all weights."""
    sizes = {name: full_size(value) for name, value in model.named_parameters()}
    left, found = share * sum(sizes.values()), set()
    for name, size in sizes.items():
        left -= size
        if left < 0:
            break
        found.add(name)
    return found


def _named(model: nn.Module, key: str, prefixes: list[str], pattern: str | None) -> set[str]:
    """Return the names of the weights that a list of prefixes, or a pattern, matches.

    Raises:
        RecipeError: one of them matches nothing, or the pattern is not a regular expression.
    """
    weights = _weights(model)
    found: set[str] = set()
    for prefix in prefixes:
        hits = [name for name in weights if inside(name, [prefix.rstrip("."), current_name(prefix.rstrip("."))])]
        if not hits:
            depth = prefix.count(".") + 1
            known = {".".join(spelt.split(".")[:depth]) for name in weights for spelt in _spellings(name)}
            raise RecipeError(
                f"tuner.{key} names {prefix!r}, but no weight's name begins with it.{hint(prefix, known)}"
            )
        found |= _first_names(key, prefix, hits, weights)
    if pattern is not None:
        hits = _by_pattern(f"{key}_regex", pattern, weights)
        found |= _first_names(f"{key}_regex", pattern, hits, weights)
    return found


def _by_pattern(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names in which the pattern is found. Numbers are whole: ``layers.[0-5].*`` does not match layer 50."""
    try:
        compiled = re.compile(NUMBER_END.sub(r"\1(?!\\d)", pattern))
    except re.error as error:
        raise RecipeError(f"tuner.{key}={pattern!r} is not a regular expression: {error}.") from error
    names = list(names)
    hits = [name for name in names if any(compiled.search(spelt) for spelt in _spellings(name))]
    if not hits:
        raise RecipeError(f"tuner.{key}={pattern!r} matches no weight's name. An example of a name: {names[-1]}.")
    return hits


def _spellings(name: str) -> tuple[str, ...]:
    """Return a weight's name and, for the language model, the short form that guides use: ``model.layers.0``."""
    short = name.replace("model.language_model.", "model.", 1)
    return (name,) if short == name else (name, short)


def _first_names(key: str, value: str, hits: list[str], weights: dict[str, str]) -> set[str]:
    """Return the first names of the matched weights, with a warning for those shared with an unmatched module."""
    found = {weights[name] for name in hits}
    for name in hits:
        if weights[name] != name and weights[name] not in hits:
            logger.warning(
                "tuner.%s %r: %s shares its weight with %s, which is treated the same", key, value, name, weights[name]
            )
    return found
