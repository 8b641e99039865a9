"""Full fine-tuning: the weights themselves train, except those of frozen parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_ft.tuning.freeze import freeze_parts, frozen_parts
from qwenvl_ft.tuning.targets import saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig


def build_full(model: nn.Module, tuner: TunerConfig) -> nn.Module:
    """Freeze the parts that are flagged; ``modules_to_save`` train even there."""
    saved = saved_modules(model, tuner)
    freeze_parts(model, frozen_parts(tuner))
    for name in saved:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    return model
