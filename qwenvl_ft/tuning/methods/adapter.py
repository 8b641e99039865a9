"""Bottleneck adapters after the MLPs of the parts that are not frozen; the aligner's mergers count as MLPs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, hint, unknown_name
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.model.anatomy import current_name, part_of
from qwenvl_ft.tuning.freeze import freeze_flags_of, frozen_parts
from qwenvl_ft.tuning.methods.lora import wrap
from qwenvl_ft.tuning.targets import ALL_LINEAR, inside, saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

MLPS = re.compile(
    r"model\.language_model\.layers\.\d+\.mlp|model\.visual\.blocks\.\d+\.mlp"
    r"|model\.visual\.merger|model\.visual\.deepstack_merger_list\.\d+"
)
"""Modules that a bottleneck can follow, by full name."""


def build_adapter(model: nn.Module, tuner: TunerConfig) -> nn.Module:
    """Wrap the model in a PeftModel whose only trained weights are the bottlenecks and full copies.

    Raises:
        RecipeError: an unknown activation, or names that match no MLP in a part that is not frozen.
    """
    from transformers.activations import ACT2FN

    from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig

    if tuner.adapter_act not in ACT2FN:
        raise unknown_name("tuner.adapter_act", tuner.adapter_act, ACT2FN)
    register_adapters()
    config = BottleneckConfig(
        length=tuner.adapter_length,
        act=tuner.adapter_act,
        task_type="CAUSAL_LM",
        target_modules=mlps(model, tuner),
        modules_to_save=saved_modules(model, tuner) or None,
    )
    return wrap(model, config, tuner)


def mlps(model: nn.Module, tuner: TunerConfig) -> list[str]:
    """Full names of the MLPs that get a bottleneck: those of the unfrozen parts that the targets name.

    ``all-linear`` is all of them; ``target_regex`` must match a whole name, and may match other modules too.

    Raises:
        RecipeError: a target matches none.
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
    for key, told, matches in _targets(tuner):
        hits = {name for name in free if matches(name)}
        if not hits:
            raise _unmatched(key, told, [name for name in known if matches(name)], free, frozen)
        chosen |= hits
    return [name for name in free if name in chosen]


def _targets(tuner: TunerConfig) -> list[tuple[str, str, Callable[[str], Any]]]:
    """What the recipe names: key, value, and the test of a full name."""
    if tuner.target_regex is not None:
        try:
            return [("target_regex", tuner.target_regex, re.compile(tuner.target_regex).fullmatch)]
        except re.error as error:
            raise RecipeError(f"tuner.target_regex={tuner.target_regex!r} is no regular expression: {error}.") from None
    return [("target_modules", told, partial(_names, told)) for told in tuner.target_modules]


def _names(told: str, name: str) -> bool:
    return told == ALL_LINEAR or any(f".{name}".endswith(f".{spelt}") for spelt in (told, current_name(told)))


def _unmatched(key: str, told: str, elsewhere: list[str], free: list[str], frozen: list[str]) -> RecipeError:
    parts = sorted({part_of(name) for name in elsewhere} & set(frozen))
    if parts:
        return RecipeError(
            f"tuner.{key} {told!r} matches only MLPs of {', '.join(parts)}, which the recipe freezes. "
            f"Set {freeze_flags_of(parts)}."
        )
    return RecipeError(
        f"tuner.{key} {told!r} matches no MLP that a bottleneck could follow.{hint(told, {_short(n) for n in free})}"
    )


def _short(name: str) -> str:
    """``model.language_model.layers.3.mlp`` -> ``mlp``; a merger by all of its name."""
    return "mlp" if name.endswith(".mlp") else name
