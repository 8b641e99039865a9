"""Gradient norms by part of the model, and a warning if a trainable part gets no gradient."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qwenvl_ft.model.anatomy import FREEZE_FLAGS, PARTS, part_of

logger = logging.getLogger(__name__)

NO_MEDIA = "no record of data.train has an image or a video, so nothing reaches it"
CAUSES = {
    "vision": "no supervised token comes after an image or video of its sample",
    "merger": "no supervised token comes after an image or video of its sample",
    "llm": "no token of these rows is supervised",
}
"""Part -> why no gradient reaches it although the data have media."""


class PartGradients(TrainerCallback):
    """Computes gradient norms by part, as before clipping.

    They stay on their device until a log line is written. DeepSpeed does not expose gradients, so it cannot be used.

    Args:
        patience: consecutive steps without a gradient in a trainable part before one warning; 0 is never.
        has_media: True if any training record has an image or a video.
    """

    def __init__(self, patience: int, *, has_media: bool) -> None:
        self.patience = patience
        self.has_media = has_media
        self._parts: dict[str, list[nn.Parameter]] = {}
        self._norms: Tensor | None = None
        self._without: Tensor | None = None
        self._warned: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Compute the norms of a step's gradients, which clipping has scaled already."""
        if not self._parts:
            for name, parameter in model.named_parameters():
                self._parts.setdefault(part_of(name), []).append(parameter)
        norms = [_norm(self._parts[part]) for part in self._trained()]
        device = next(iter(self._parts.values()))[0].device
        found = torch.stack([torch.zeros((), device=device) if norm is None else norm for norm in norms])
        self._norms = found
        steps = torch.zeros_like(found, dtype=torch.int64) if self._without is None else self._without
        self._without = (steps + 1) * (found == 0)

    def read(self, total: float | None) -> dict[str, float]:
        """Return ``grad_norm/PART`` of the last step, and warn of parts without a gradient; waits for the device.

        Args:
            total: norm of all gradients of that step before clipping; None if they were not clipped.
        """
        if self._norms is None or self._without is None:
            return {}
        left = float(torch.linalg.vector_norm(self._norms))
        if left == 0 and total:
            return {}  # the gradients are not in ``parameter.grad``
        trained = self._trained()
        for part, steps in zip(trained, self._without.tolist(), strict=True):
            if self.patience and steps >= self.patience and part not in self._warned:
                self._warned.add(part)
                logger.warning("%s", _warning(part, steps, self.has_media))
        scale = float(total) / left if total is not None and left > 0 and math.isfinite(total) else 1.0
        return {f"grad_norm/{part}": norm * scale for part, norm in zip(trained, self._norms.tolist(), strict=True)}

    def _trained(self) -> list[str]:
        return [part for part in PARTS if any(value.requires_grad for value in self._parts.get(part, ()))]


def _norm(parameters: list[nn.Parameter]) -> Tensor | None:
    """Return the float32 norm of the parameters' gradients; None if they have none."""
    grads = [value.grad for value in parameters if value.grad is not None]
    if not grads:
        return None
    norm: Any = torch.nn.utils.get_total_norm(grads)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.float()


def _warning(part: str, steps: int, has_media: bool) -> str:
    cause = NO_MEDIA if part != "llm" and not has_media else CAUSES[part]
    return (
        f"no gradient has reached the {part} part for {steps} steps although it trains: probably {cause}. Look at a "
        f"row with qwenvl-ft show, or set tuner.{FREEZE_FLAGS[part]}=true."
    )
