"""A batch on its device, with its labels split for the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from qwenvl_ft.model.sequence_parallel import RowShare, SequenceGroup
from qwenvl_ft.training.loss import split_labels


@dataclass
class DeviceBatch:
    """The tensors of a batch, in a form that transformers does not inspect, and its loss."""

    tensors: dict[str, Any]
    loss: Tensor | None = None
    """Scalar that `compute_loss` returned for it."""

    @property
    def weight(self) -> Tensor | int:
        """The number of its supervised tokens, or the sum of their weights."""
        weights = self.tensors.get("target_weights")
        return self.tensors["targets"].numel() if weights is None else cast(Tensor, weights.sum())


def on_device(
    batch: dict[str, Any],
    device: torch.device,
    weights: Mapping[str, float] | None = None,
    group: SequenceGroup | None = None,
) -> dict[str, Any]:
    """Split a batch's labels and move its tensors; neither waits for a GPU, and float32 stays float32.

    Args:
        batch: from a collator, on the CPU.
        weights: see `split_labels`, whose keys the result has.
        group: the ranks that share the row; the result has this rank's part (`SequenceGroup.share`).
    """

    def move(value: Tensor) -> Tensor:
        pin = value.device.type == "cpu" and device.type == "cuda" and not value.is_pinned()
        return (value.pin_memory() if pin else value).to(device, non_blocking=True)

    moved = split_labels(batch, weights)
    if group is not None:
        moved = group.share(moved)
    for name, value in moved.items():
        if isinstance(value, Tensor):
            moved[name] = move(value)
        elif isinstance(value, RowShare):
            moved[name] = value.map(move)
    return moved
