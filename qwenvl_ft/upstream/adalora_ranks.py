"""Restricts peft's AdaLoRA rank allocator to trainable layers, and exposes its state for checkpoints.

Relies on `peft.tuners.adalora.RankAllocator`, which is the same in peft 0.17.1 to 0.21.2: ``RankAllocator(model,
peft_config, adapter_name)`` counts the ranks of all layers when it is created; ``update_and_allocate`` and
``mask_using_rank_pattern`` iterate over ``model.named_parameters()``; ``ipt``, ``exp_avg_ipt`` and ``exp_avg_unc`` are
dicts by parameter name; ``BaseTuner.rankallocator`` is the instance in use. If any of these is missing, AdaLoRA is
refused in one line.

Each layer also holds its rank as a frozen parameter, ``ranknum``. Over a 16-bit base model peft converts the adapter's
weights to float32 by assigning them anew, which makes this one trainable (peft 0.21.2; up to 0.21.0 it converts in
place). `freeze_rank_numbers` freezes it again, and does nothing where no parameter has that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwenvl_ft.upstream.probe import Feature, lacks, takes

if TYPE_CHECKING:
    from peft import PeftModel

MEMORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Attributes in which the allocator keeps importance scores by parameter name."""


class _Trained:
    """A view of a model with only its trainable parameters: frozen layers keep their ranks, outside the budget."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)


def count_trained_ranks(model: PeftModel) -> None:
    """Set AdaLoRA's rank budget to the trainable layers of ``model``, a PeftModel; importance scores are kept.

    Raises:
        RecipeError: the installed peft's allocator has another interface.
    """
    RANKS.require("tuner.train_type=adalora")
    from peft.tuners.adalora import RankAllocator

    class TrainedRanks(RankAllocator):  # type: ignore[misc]
        def update_and_allocate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update_and_allocate(_Trained(model), *args, **kwargs)

        def mask_using_rank_pattern(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().mask_using_rank_pattern(_Trained(model), *args, **kwargs)

    tuner: Any = model.base_model
    adapter = model.active_adapter
    ranks = TrainedRanks(_Trained(tuner.model), model.peft_config[adapter], adapter)
    for kind, kept in memory_of(model).items():
        setattr(ranks, kind, kept)
    tuner.rankallocator = ranks


def freeze_rank_numbers(model: nn.Module) -> None:
    """Freeze the parameters in which the layers hold their rank, a constant by which the update is divided."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def memory_of(model: PeftModel) -> dict[str, dict[str, Tensor]]:
    """Return kind of score -> parameter name -> score; the inner dicts are the allocator's own, not copies."""
    return {kind: getattr(model.base_model.rankallocator, kind) for kind in MEMORY}


def _other_allocator() -> str:
    from peft.tuners import adalora

    methods = "update_and_allocate", "mask_using_rank_pattern", "reset_ipt"
    if reason := lacks("peft.tuners.adalora", ("RankAllocator",)) or lacks(adalora.RankAllocator, methods):
        return reason
    return takes(adalora.RankAllocator, "model", "peft_config", "adapter_name")


RANKS = Feature(
    name="AdaLoRA rank allocation over trainable layers",
    packages=("peft",),
    missing=_other_allocator,
)
FEATURES = (RANKS,)
