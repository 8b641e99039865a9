"""Stops a run at the first loss or gradient that is not finite, without waiting for the device at every step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from qwenvl_ft.errors import TrainingError


@dataclass(frozen=True)
class _PassLoss:
    """The loss of one micro-batch."""

    step: int
    trained: Tensor
    """Scalar on which the backward pass was called."""
    computed: Any
    """Scalar that `compute_loss` returned."""
    sources: list[Any]


class LossCheck:
    """Keeps the losses of micro-batches on their device until they are checked.

    Args:
        at_once: check losses on a CPU when they are added; with several ranks, one would leave the others waiting.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self.at_once = at_once
        self._unchecked: list[_PassLoss] = []

    def add(self, step: int, trained: Tensor, computed: Any, sources: list[Any]) -> None:
        """Take the loss of one micro-batch.

        Args:
            step: number of the optimizer step, from 1.
            trained: scalar that the backward pass began at.
            computed: scalar that `compute_loss` returned.
            sources: of the records in the micro-batch.
        """
        self._unchecked.append(_PassLoss(step, trained, computed, sources))
        if self.at_once and trained.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Check the losses since the last check; waits for the device once.

        Raises:
            TrainingError: a loss is not finite, or transformers changed it before the backward pass.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        losses = torch.stack([torch.stack((entry.trained, entry.computed)).double() for entry in unchecked]).tolist()
        for entry, (trained, computed) in zip(unchecked, losses, strict=True):
            if not math.isfinite(trained):
                rows = ", ".join(str(source) for source in entry.sources)
                raise TrainingError(
                    f"step {entry.step}: the loss is {trained} in the row of {rows}. Look at these "
                    "records; else lower training.learning_rate or training.max_grad_norm, or use "
                    "model.torch_dtype=bfloat16 instead of float16.",
                    step=entry.step,
                )
            if trained != computed:
                raise TrainingError(
                    f"step {entry.step}: transformers {transformers.__version__} made {trained} of the loss {computed} "
                    "before the backward pass. Install a version that docs/compatibility.md lists."
                )


def require_finite_norm(step: int, norm: float) -> None:
    """Raise TrainingError if the norm of a step's gradients is not finite."""
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: the gradient norm is {norm} although the loss is finite. Lower training.learning_rate, "
            "or use model.torch_dtype=bfloat16 instead of float16."
        )
