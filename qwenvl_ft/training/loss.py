"""The loss: cross entropy over supervised tokens only, as a sum, so that any split of a batch adds up to the same.

Letters: S rows, T tokens of a row, K supervised tokens, V words.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenvl_ft.data.draft import IGNORE

HEAD_CHUNK = 4_096
"""Supervised tokens whose logits are turned to float32 at a time."""


def split_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace ``labels`` by the positions that predict a supervised token and by those tokens.

    Done on the CPU, where the number of supervised tokens is known without waiting for a device. Most tokens of a row
    are images and prompt; the language head never sees them.

    Returns:
        The batch without ``labels`` and ``sources``, with ``targets`` int64[K] and ``logits_to_keep``: int64[K] for
        one row, bool[S, T] for padded rows. A row without supervised tokens keeps its first position and has no
        target.
    """
    labels = batch["labels"]
    keep = F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE  # [S, T] at the token before each target
    targets = labels[:, 1:][keep[:, :-1]]
    if not keep.any():
        keep[0, 0] = True
    rest = {key: value for key, value in batch.items() if key not in ("labels", "sources")}
    rest["logits_to_keep"] = keep[0].nonzero(as_tuple=True)[0] if keep.shape[0] == 1 else keep
    rest["targets"] = targets
    return rest


def loss_sum(model: nn.Module, batch: dict[str, Any], *, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross entropy over the batch's targets: float32 for each, float64 for the sum.

    Args:
        batch: from `split_labels`, on the model's device.

    Returns:
        A scalar; 0 with a (zero) gradient where nothing is supervised, so that every rank still runs backward.
    """
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    targets = batch["targets"]
    logits = model(**inputs).logits  # [1, K, V] or [K, V]
    logits = logits.reshape(-1, logits.shape[-1])
    if targets.numel() == 0:
        return logits.double().sum() * 0.0
    parts = zip(logits.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": label_smoothing}
    return torch.cat([F.cross_entropy(part.float(), target, **options) for part, target in parts]).double().sum()
