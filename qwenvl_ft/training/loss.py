"""The loss: cross entropy over supervised tokens only, as a sum, so that any split of a batch adds up to the same.

Letters: S rows, T tokens of a row, K supervised tokens, V words.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qwenvl_ft.data.draft import IGNORE

HEAD_CHUNK = 1_024
"""Supervised tokens whose logits exist at a time: 0.6 GiB of float32 at 151,936 words, and as much for its gradient."""


def split_labels(batch: dict[str, Any], weights: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Replace ``labels`` by the positions that predict a supervised token and by those tokens.

    Done on the CPU, where the number of supervised tokens is known without waiting for a device. Most tokens of a row
    are images and prompt; the language head never sees them.

    Args:
        weights: data set -> weight of its tokens in the loss; 1 for those that are not named.

    Returns:
        The batch without ``labels``, ``sources`` and ``faults``, with ``targets`` int64[K] and ``logits_to_keep``:
        int64[K] for one row, bool[S, T] for padded rows. A row without supervised tokens keeps its first position and
        has no target. With weights, ``target_weights`` float64[K].
    """
    labels = batch["labels"]
    keep = F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE  # [S, T] at the token before each target
    targets = labels[:, 1:][keep[:, :-1]]
    if not keep.any():
        keep[0, 0] = True
    rest = {key: value for key, value in batch.items() if key not in ("labels", "sources", "faults")}
    rest["logits_to_keep"] = keep[0].nonzero(as_tuple=True)[0] if keep.shape[0] == 1 else keep
    rest["targets"] = targets
    if weights:
        rest["target_weights"] = target_weights(batch, weights)
    return rest


def target_weights(batch: dict[str, Any], weights: Mapping[str, float]) -> Tensor:
    """float64[K], the weight of each supervised token's data set; a group of several has their mean."""
    labels = batch["labels"]
    told = [_weight_of(source.dataset, weights) for source in batch["sources"]]
    if "cu_seq_lens_q" in batch:  # one flat row; fillers behind the samples have no labels
        lengths = batch["cu_seq_lens_q"].diff().long()
        sample = torch.tensor(told + [1.0] * (len(lengths) - len(told)), dtype=torch.float64)
        tokens = sample.repeat_interleave(lengths)[None]  # [1, T]
    else:
        rows = told + [1.0] * (labels.shape[0] - len(told))
        tokens = torch.tensor(rows, dtype=torch.float64)[:, None].expand(labels.shape)  # [S, T]
    return tokens[:, 1:][labels[:, 1:] != IGNORE]


def _weight_of(dataset: str, weights: Mapping[str, float]) -> float:
    names = [dataset] if dataset in weights else dataset.split("+")
    return sum(weights[name] if name in weights else 1.0 for name in names) / len(names)


def loss_sum(model: nn.Module, batch: dict[str, Any], *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum of the cross entropy over the batch's targets: float32 for each, float64 for the sum.

    The head turns hidden states into losses a chunk at a time and, where there is more than one, again in the backward
    pass, so that no K x V tensor ever exists.

    Args:
        batch: from `split_labels`, on the model's device. Each loss counts as often as its weight, if there are any.
        z_loss: weight of the squared logarithm of each softmax's sum, which keeps logits near 0 (PaLM, 2204.02311).

    Returns:
        A scalar; 0 with a (zero) gradient where nothing is supervised, so that every rank still runs backward.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("targets", "target_weights")}
    targets = batch["targets"]
    if targets.numel() == 0:
        return model(**inputs).logits.double().sum() * 0.0
    head = _head_loss(model)
    head.targets, head.label_smoothing, head.z_loss = targets, label_smoothing, z_loss
    try:
        losses = model(**inputs).logits.double()
        return losses.sum() if "target_weights" not in batch else losses.flatten() @ batch["target_weights"]
    finally:
        head.targets = None


class HeadLoss:
    """Stands in for the language head's ``forward``: as it is, or the loss of each token while targets are set.

    The head keeps its place, hooks and weights, so that adapters on it, tied weights, sharding and saving do not
    notice.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward
        self.targets: Tensor | None = None
        self.label_smoothing = self.z_loss = 0.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` -> logits ``[..., V]``, or losses float32 ``[..., 1]`` with targets."""
        if self.targets is None:
            return self.forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights = self.label_smoothing, self.z_loss  # as arguments: set anew before the backward pass computes again
        parts = list(zip(flat.split(HEAD_CHUNK), self.targets.split(HEAD_CHUNK), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            losses = [checkpoint(self._losses, *part, *weights, use_reentrant=False) for part in parts]
        else:
            losses = [self._losses(*part, *weights) for part in parts]
        return torch.cat(losses).view(*hidden.shape[:-1], 1)

    def _losses(self, hidden: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
        logits = self.forward(hidden).float()
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


def _head_loss(model: nn.Module) -> HeadLoss:
    """The stand-in of a model's head, put there at the first call; wrappers (DDP, adapters) are looked through."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    head: Any = inner.get_output_embeddings()
    if not isinstance(head.forward, HeadLoss):
        head.forward = HeadLoss(head.forward)
    return head.forward
