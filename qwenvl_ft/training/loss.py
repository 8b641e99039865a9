"""The loss: cross entropy over supervised tokens only, as a sum, so that any split of a batch adds up to the same
value.

Letters: S rows, T tokens of a row, K supervised tokens, V vocabulary size, D hidden width.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qwenvl_ft.data.collate import ASIDE
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.upstream.layers import is_plain_linear, owner_of, replace_forward

HEAD_CHUNK = 1_024
"""Supervised tokens whose logits exist at a time: 0.6 GiB of float32 with a vocabulary of 151,936 tokens."""
CPU_CHUNK = 128
"""The same for a plain head on a CPU: a product of 128 rows is as fast there as one of 1,024, and needs less memory."""


def split_labels(batch: dict[str, Any], weights: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Replace ``labels`` by the positions that predict a supervised token and by those tokens.

    Call it on the CPU, where the number of supervised tokens is known without waiting for a device. Most tokens of a
    row are images and prompt; the language head never sees them.

    Args:
        weights: data set -> weight of its tokens in the loss; 1 for data sets without an entry. None weights nothing,
            not even the turns that have a weight of their own.

    Returns:
        The batch without ``labels``, ``sources`` and ``faults``, with ``targets`` int64[K] and, for one row,
        ``logits_to_keep`` int64[K]. Padded rows have ``predicting`` bool[S, T] instead, because transformers accepts
        such a mask only since 5.21. A row without supervised tokens keeps its first position and has no target. With
        weights, ``target_weights`` float64[K].
    """
    labels = batch["labels"]
    keep = F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE  # [S, T] at the token before each target
    targets = labels[:, 1:][keep[:, :-1]]
    if not keep.any():
        keep[0, 0] = True
    rest = {key: value for key, value in batch.items() if key not in ASIDE}
    if keep.shape[0] == 1:
        rest["logits_to_keep"] = keep[0].nonzero(as_tuple=True)[0]
    else:
        rest["predicting"] = keep
    rest["targets"] = targets
    if weights is not None and (weights or "label_weights" in batch):
        rest["target_weights"] = target_weights(batch, weights)
    return rest


def target_weights(batch: dict[str, Any], weights: Mapping[str, float]) -> Tensor:
    """Return float64[K]: the loss weight of each supervised token.

    It is the weight of its data set (the mean for a group of several) times that of its turn.
    """
    labels = batch["labels"]
    by_source = [_weight_of(source.dataset, weights) for source in batch["sources"]]
    if "cu_seq_lens_q" in batch:  # one flat row; fillers behind the samples have no labels
        lengths = batch["cu_seq_lens_q"].diff().long()
        sample = torch.tensor(by_source + [1.0] * (len(lengths) - len(by_source)), dtype=torch.float64)
        tokens = sample.repeat_interleave(lengths)[None]  # [1, T]
    else:
        rows = by_source + [1.0] * (labels.shape[0] - len(by_source))
        tokens = torch.tensor(rows, dtype=torch.float64)[:, None].expand(labels.shape)  # [S, T]
    if "label_weights" in batch:
        tokens = tokens * batch["label_weights"]
    return tokens[:, 1:][labels[:, 1:] != IGNORE]


def weight_sum(batch: dict[str, Any], weights: Mapping[str, float]) -> float:
    """Return the summed loss weights of a batch's supervised tokens; their number if none has a weight of its own."""
    if weights or "label_weights" in batch:
        return float(target_weights(batch, weights).sum())
    return float((batch["labels"][:, 1:] != IGNORE).sum())


def _weight_of(dataset: str, weights: Mapping[str, float]) -> float:
    names = [dataset] if dataset in weights else dataset.split("+")
    return sum(weights[name] if name in weights else 1.0 for name in names) / len(names)


def loss_sum(model: nn.Module, batch: dict[str, Any], *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Return the sum of the cross entropies of a batch's targets: float32 for each, float64 for the sum.

    The head computes the loss from hidden states a chunk at a time, so that no K x V tensor ever exists.

    Args:
        batch: from `split_labels`, on the model's device. Losses are multiplied by ``target_weights``, if any.
        z_loss: weight of the squared logarithm of each softmax's sum, which keeps logits near 0 (PaLM, 2204.02311).

    Returns:
        A scalar; 0 with a (zero) gradient where nothing is supervised, so that every rank still runs backward.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("targets", "target_weights")}
    targets = batch["targets"]
    head = _head_loss(model)
    head.targets, head.weights = (targets, batch.get("target_weights")) if targets.numel() else (None, None)
    head.predicting = batch.get("predicting")
    head.label_smoothing, head.z_loss = label_smoothing, z_loss
    try:
        result: Tensor = model(**inputs).logits
        return result if targets.numel() else result.double().sum() * 0.0
    finally:
        head.targets = head.weights = head.predicting = None


def use_fused_loss(model: nn.Module, function: Any) -> str:
    """Compute the head's loss with Liger's fused linear cross entropy where it can.

    It computes what `_LinearLoss` does, with one kernel for softmax, loss and gradient, but waits for the device twice
    a step. `_LinearLoss` is still used for weighted tokens, and for a trainable head over frozen hidden states.

    Args:
        function: ``LigerFusedLinearCrossEntropyFunction``.

    Returns:
        The reason why it is not used; empty if it is.
    """
    head = _head_loss(model)
    if not head.is_linear:
        kind = type(owner_of(head.head_forward) or head.head_forward)
        return f"the language head is not a plain linear layer ({kind.__name__} of {kind.__module__})"
    head.fused = function
    return ""


class HeadLoss:
    """Replaces the language head's ``forward``: it returns the sum of the losses while targets are set, else logits.

    The head itself stays in the model with its hooks and weights, so adapters on it, tied weights, sharding and saving
    work as before.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.head_forward = forward
        self.targets: Tensor | None = None
        self.weights: Tensor | None = None
        self.predicting: Tensor | None = None
        self.label_smoothing = self.z_loss = 0.0
        self.fused: Any = None

    @property
    def is_linear(self) -> bool:
        """True if the head is one matrix product without a bias."""
        head: Any = owner_of(self.head_forward)
        return is_plain_linear(self.head_forward) and head.bias is None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map ``[..., D]`` to logits ``[..., V]``; or, with targets int64[K], K hidden states to a float64 scalar.

        Raises:
            ValueError: the numbers of hidden states and targets differ.
        """
        if self.predicting is not None:
            hidden = hidden[self.predicting]
        if self.targets is None:
            return self.head_forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])  # [K, D]
        targets = self.targets.to(flat.device)
        if len(flat) != len(targets):
            raise ValueError(f"{len(flat)} hidden states do not match {len(targets)} targets")
        weights = torch.ones(len(flat), dtype=torch.float64, device=flat.device)
        weights = weights if self.weights is None else self.weights.to(flat.device)
        # Passed as arguments, because the attributes may change before the backward pass recomputes.
        options = self.label_smoothing, self.z_loss
        if (weight := self._plain_weight(flat)) is not None:
            if self.fused is not None and self.weights is None and (flat.requires_grad or not torch.is_grad_enabled()):
                return _ligers_loss(self.fused, flat, weight, targets, *options).double()
            return cast(Tensor, _linear_loss(flat, weight, targets, weights, *options))
        parts = list(zip(torch.split(flat, HEAD_CHUNK), torch.split(targets, HEAD_CHUNK), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            losses = [checkpoint(self._losses, *part, *options, use_reentrant=False) for part in parts]
        else:
            losses = [self._losses(*part, *options) for part in parts]
        return torch.cat(losses).double() @ weights

    def _plain_weight(self, hidden: Tensor) -> Tensor | None:
        """Return ``[V, D]`` of a head that is one matrix product; None if it is adapted, quantised or sharded.

        In float16 it is None too: autograd's gradients are scaled before they could underflow.
        """
        head: Any = owner_of(self.head_forward)
        if not self.is_linear:
            return None
        is_plain = type(head.weight) in (Tensor, nn.Parameter)
        return head.weight if is_plain and _product_dtype(hidden, head.weight) != torch.float16 else None

    def _losses(self, hidden: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
        logits = self.head_forward(hidden).float()
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in under the current autocast."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _ligers_loss(
    function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """Return the sum of the losses by Liger, at most `HEAD_CHUNK` tokens at a time: a float32 scalar."""
    words, width = weight.shape
    chunks = -(-len(targets) // HEAD_CHUNK)
    values = {
        "_input": hidden,
        "weight": weight,
        "target": targets,
        "lse_square_scale": z_loss,
        "label_smoothing": label_smoothing,
        "reduction": "sum",
        "accum_dtype": torch.float32,
        "chunk_mem_const": max(words // (width * chunks), 1),  # times as many logits as hidden states
    }
    known = list(inspect.signature(function.forward).parameters.values())[1:]  # without ctx
    total: Tensor = function.apply(*(values.get(entry.name, entry.default) for entry in known))[0]
    return total


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """Return the weighted sum of the losses of ``hidden`` [K, D] under a head ``weight`` [V, D]: a float64 scalar."""
    needed = [torch.is_grad_enabled() and value.requires_grad for value in (hidden, weight)]
    apply: Callable[..., Tensor] = _LinearLoss.apply
    return apply(hidden, weight, targets, weights, label_smoothing, z_loss, needed)


class _LinearLoss(torch.autograd.Function):
    """A linear head and its loss; the forward pass computes the gradients too, while it has a chunk's logits.

    The gradient of a chunk overwrites its logits, so only one chunk exists at a time and nothing is recomputed. The
    idea is Liger's (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        label_smoothing: float,
        z_loss: float,
        needed: list[bool],
    ) -> Tensor:
        dtype = _product_dtype(hidden, weight)
        chunk = min(HEAD_CHUNK, CPU_CHUNK) if hidden.device.type == "cpu" else HEAD_CHUNK
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        # summed in float32: in 16 bits each chunk would round the sum of all before it
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        total = weights.new_zeros(())
        place = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=torch.float32)  # [chunk, V]
        with torch.autocast(hidden.device.type, enabled=False):
            words = weight.to(dtype)
            for begin in range(0, len(hidden), chunk):
                part = slice(begin, begin + chunk)
                states = hidden[part].to(dtype)
                logits = place[: len(states)]
                if dtype == torch.float32:
                    torch.mm(states, words.T, out=logits)
                else:
                    logits.copy_(states @ words.T)
                losses = _losses_of(logits, targets[part], weights[part].float(), label_smoothing, z_loss)
                total += losses.double() @ weights[part]
                gradient = logits.to(dtype)
                if of_hidden is not None:
                    of_hidden[part] = gradient @ words
                if of_weight is not None and of_weight.dtype == dtype:
                    torch.addmm(of_weight, gradient.T, states, out=of_weight)
                elif of_weight is not None:
                    of_weight += gradient.T @ states
        ctx.gradients, ctx.dtype = (of_hidden, of_weight), weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        of_hidden, of_weight = (None if value is None else value.mul_(scale) for value in ctx.gradients)
        del ctx.gradients  # a second pass would scale them again
        of_weight = None if of_weight is None else of_weight.to(ctx.dtype)
        return of_hidden, of_weight, None, None, None, None, None


def _losses_of(logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Return float32[k], the losses of logits float32[k, V], which the gradient of ``weights @ losses`` overwrites."""
    rows = torch.arange(len(targets), device=logits.device)
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest)
    losses = -(1 - label_smoothing) * logits[rows, targets]
    if label_smoothing:
        losses -= label_smoothing * logits.mean(-1)
    sums = logits.exp_().sum(-1, keepdim=True)
    losses += sums.log().squeeze(-1)
    share = weights[:, None] / sums  # [k, 1]
    if z_loss:
        norm = sums.log() + largest
        losses += z_loss * norm.square().squeeze(-1)
        share = share * (1 + 2 * z_loss * norm)
    logits.mul_(share)
    if label_smoothing:
        logits -= weights[:, None] * (label_smoothing / logits.shape[-1])
    logits[rows, targets] -= weights * (1 - label_smoothing)
    return losses


def _head_loss(model: nn.Module) -> HeadLoss:
    """Return the `HeadLoss` of a model, inserted at the first call; works through wrappers (DDP, adapters)."""
    inner: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    head: Any = inner.get_output_embeddings()
    if not isinstance(head.forward, HeadLoss):
        replace_forward(head, HeadLoss(head.forward))
    return cast(HeadLoss, head.forward)
