"""The evaluation loss: the mean over all supervised tokens of a set, whatever the batches and ranks."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.model.sequence_parallel import SequenceGroup
from qwenvl_ft.training.bad_samples import log_bad_samples
from qwenvl_ft.training.device_batch import on_device
from qwenvl_ft.training.loss import loss_sum

MAX_EXPONENT = 700.0
"""Cap on the mean loss when its perplexity is computed: ``exp`` overflows in float64 above 709."""


def evaluate_sum(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    group: SequenceGroup | None = None,
) -> tuple[Tensor, int]:
    """Run a model over batches in evaluation mode, and restore its mode afterwards.

    Args:
        group: the ranks that share each row, if several do.

    Returns:
        float64[2], this rank's summed loss and number of supervised tokens; and its number of replaced samples.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    bad = 0
    try:
        with torch.no_grad():
            for inputs in batches:
                bad += log_bad_samples(inputs)
                batch = on_device(inputs, device, group=group)
                with autocast():
                    total[0] += loss_sum(model, batch).double()
                total[1] += batch["targets"].numel()
    finally:
        model.train(was_training)
    return total, bad


def loss_metrics(loss: float, tokens: float, prefix: str) -> dict[str, float]:
    """Return ``PREFIX_loss``, ``_perplexity`` and ``_supervised_tokens`` from a summed loss over ``tokens``."""
    mean = loss / max(tokens, 1)
    return {
        f"{prefix}_loss": mean,
        f"{prefix}_perplexity": math.exp(min(mean, MAX_EXPONENT)),
        f"{prefix}_supervised_tokens": int(tokens),
    }


def joint_metrics(metrics: dict[str, float], names: Iterable[str], prefix: str) -> dict[str, float]:
    """Return the metrics of several named sets as if they were one set: the mean over all their tokens."""
    tokens = {name: metrics[f"{prefix}_{name}_supervised_tokens"] for name in names}
    loss = sum(metrics[f"{prefix}_{name}_loss"] * count for name, count in tokens.items())
    return loss_metrics(loss, sum(tokens.values()), prefix)
