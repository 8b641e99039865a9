"""Train type ``adapter``: bottleneck adapters after the MLPs of the unfrozen parts; the mergers count as MLPs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, hint, unknown_name
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.model.anatomy import current_name, part_of
from qwenvl_ft.tuning.freeze_flags import freeze_flags_of, frozen_parts
from qwenvl_ft.tuning.methods.lora import wrap_own
from qwenvl_ft.tuning.targets import ALL_LINEAR, inside, saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

MLPS = re.compile(
    r"model\.language_model\.layers\.\d+\.mlp|model\.visual\.blocks\.\d+\.mlp"
    r"|model\.visual\.merger|model\.visual\.deepstack_merger_list\.\d+"
)
"""Matches the full names of the modules that a bottleneck adapter can follow."""


def build_adapter(model: nn.Module, tuner: TunerConfig) -> nn.Module:
    """Wrap the model in a PeftModel whose only trainable weights are the adapters and ``modules_to_save``.

    Raises:
        RecipeError: an unknown activation, or names that match no MLP in an unfrozen part.
    """
    from transformers.activations import ACT2FN

    from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig

    if tuner.adapter_act not in ACT2FN:
        raise unknown_name("tuner.adapter_act", tuner.adapter_act, ACT2FN)
    register_adapters()
    settings = {"length": tuner.adapter_length, "act": tuner.adapter_act}
    return wrap_own(model, BottleneckConfig, tuner, mlps(model, tuner), **settings)


def mlps(model: nn.Module, tuner: TunerConfig) -> list[str]:
    """Return the full names of the MLPs that get an adapter: those in unfrozen parts that the targets name.

    ``all-linear`` means all of them. ``target_regex`` must match a whole name, and may match other modules too.

    Raises:
        RecipeError: a target matches no MLP.
    """
    frozen, saved = frozen_parts(tuner), saved_modules(model, tuner)
    known = [name for name, _ in model.named_modules() if MLPS.fullmatch(name)]
    free = [name for name in known if part_of(name) not in frozen and not inside(name, saved)]
    if not free:
        raise RecipeError(
            f"tuner.train_type=adapter finds no MLP in an unfrozen part (frozen: {', '.join(frozen) or 'none'}). "
            "Unfreeze a part, e.g. tuner.freeze_llm=false."
        )
    chosen: set[str] = set()
    for key, target, matches in _targets(tuner):
        hits = {name for name in free if matches(name)}
        if not hits:
            raise _unmatched(key, target, [name for name in known if matches(name)], free, frozen)
        chosen |= hits
    return [name for name in free if name in chosen]


def _targets(tuner: TunerConfig) -> list[tuple[str, str, Callable[[str], Any]]]:
    """Return the recipe's targets: (key, value, test of a module's full name) each."""
    if tuner.target_regex is not None:
        try:
            return [("target_regex", tuner.target_regex, re.compile(tuner.target_regex).fullmatch)]
        except re.error as error:
            raise RecipeError(
                f"tuner.target_regex={tuner.target_regex!r} is not a regular expression: {error}."
            ) from None
    return [("target_modules", target, partial(_matches, target)) for target in tuner.target_modules]


def _matches(target: str, name: str) -> bool:
    return target == ALL_LINEAR or any(f".{name}".endswith(f".{spelt}") for spelt in (target, current_name(target)))


def _unmatched(key: str, target: str, elsewhere: list[str], free: list[str], frozen: list[str]) -> RecipeError:
    parts = sorted({part_of(name) for name in elsewhere} & set(frozen))
    if parts:
        return RecipeError(
            f"tuner.{key} {target!r} matches only MLPs of {', '.join(parts)}, which the recipe freezes. "
            f"Set {freeze_flags_of(parts)}."
        )
    known = {_short(name) for name in free}
    return RecipeError(f"tuner.{key} {target!r} matches no MLP that a bottleneck could follow.{hint(target, known)}")


def _short(name: str) -> str:
    """Shorten ``model.language_model.layers.3.mlp`` to ``mlp``; a merger keeps its full name."""
    return "mlp" if name.endswith(".mlp") else name
