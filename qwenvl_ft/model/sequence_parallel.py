"""Trains one row on several ranks: each keeps its part of the tokens and runs its share of the vision tower.

The N ranks of a group get the same row of T tokens. In the language model, rank p computes tokens p * T / N to
(p + 1) * T / N. Only attention needs the others: before it, the ranks exchange heads for tokens, so that each has all
tokens of H / N heads and calls the same kernel as without this module, with the borders of the whole row; after it,
they exchange back (DeepSpeed-Ulysses, arXiv 2309.14509). In the vision tower, each rank runs the frames that the batch
assigns to it, and the features go to the ranks that hold their tokens. All exchanges carry gradients.

Parameters, gradients and optimizers know nothing of it: each rank's loss is the sum over its own supervised tokens, and
summed over all ranks the gradients are those of the whole row.

Letters: N ranks of a group, T tokens of a row, t = T / N, H heads, D head size or width of a feature, F frames of a
row, V media tokens of a row, K supervised tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.attention import attention_of
from qwenvl_ft.upstream.media import KINDS, PLACES, SHARE

KEY = "training.sequence_parallel_size"
WITH_MASK = ("sdpa", "eager")
"""Attention implementations that separate the samples of a row by a mask of T * T, so that long rows do not fit."""


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that share each row."""

    size: int
    """N."""
    place: int
    """This rank's place among them, 0 to N - 1."""
    ranks: Any
    """Their ``torch.distributed.ProcessGroup``."""

    @classmethod
    def of(cls, size: int, timeout: timedelta | None = None) -> SequenceGroup:
        """Create the groups of the run: the first N ranks, the next N, and so on. Every rank must call it.

        Raises:
            RecipeError: the number of ranks is no multiple of N.
        """
        require_ranks(size, dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)
        return cls(size, dist.get_rank() % size, own_group(size, timeout))

    def __deepcopy__(self, memo: Any) -> SequenceGroup:
        return self  # a process group cannot be copied

    def part(self, tokens: int) -> slice:
        """Return this rank's part of a row of T tokens.

        Raises:
            ValueError: N does not divide T.
        """
        if tokens % self.size:
            raise ValueError(f"a row of {tokens} tokens cannot be shared by {self.size} ranks")
        own = tokens // self.size
        return slice(self.place * own, (self.place + 1) * own)

    def share(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut a row to this rank's tokens, on the CPU.

        Args:
            batch: the whole row, with its labels split (`split_labels`); of its media, the pixels and grids of this
                rank's own frames, and ``image_owners`` int64[F], the place of the rank that runs each frame,
                ``image_tokens`` int64[F], the tokens of each frame, ``image_places`` int64[V] (for videos likewise).
                Behind the own frames there may be others, whose features nobody needs.

        Returns:
            The batch with ``input_ids`` [1, t] and ``position_ids`` [4, 1, t]; those of ``targets``,
            ``target_weights`` and ``logits_to_keep`` that belong to these tokens; ``row_share``, a `RowShare`; and
            all else as it was, such as the borders of the whole row's samples.
        """
        part = self.part(batch["input_ids"].shape[1])
        size = part.stop - part.start
        shared = batch | self._targets(batch, part)
        shared["input_ids"] = batch["input_ids"][:, part]
        shared["position_ids"] = batch["position_ids"][..., part]
        owners, places, features = [], [], {}
        for kind in KINDS:
            if f"{kind}_owners" not in batch:
                continue
            by_token = shared.pop(f"{kind}_owners").repeat_interleave(shared.pop(f"{kind}_tokens"))
            owners.append(by_token)
            places.append(shared.pop(f"{kind}_places"))
            features[kind] = int((by_token == self.place).sum())
        owner, place = torch.cat(owners), torch.cat(places)  # [V]
        holder = place // size  # the rank that holds each media token
        to, source = holder[owner == self.place], owner[holder == self.place]
        shared[SHARE] = RowShare(
            group=self,
            features=features,
            order=torch.argsort(to, stable=True),
            sends=torch.bincount(to, minlength=self.size).tolist(),
            receives=torch.bincount(source, minlength=self.size).tolist(),
            tokens=place[holder == self.place][torch.argsort(source, stable=True)] - part.start,
        )
        return shared

    @staticmethod
    def _targets(batch: dict[str, Any], part: slice) -> dict[str, Tensor]:
        """Return the targets that this part of the row predicts; without any, its first position and no target."""
        kept, targets = batch["logits_to_keep"], batch["targets"]
        own = (kept >= part.start) & (kept < part.stop) & (targets.numel() > 0)  # [K]
        found = {"targets": targets[own] if targets.numel() else targets}
        found["logits_to_keep"] = kept[own] - part.start if bool(own.any()) else kept.new_zeros(1)
        if "target_weights" in batch:
            found["target_weights"] = batch["target_weights"][own] if targets.numel() else batch["target_weights"]
        return found


@dataclass(frozen=True, eq=False)
class RowShare:
    """What a rank sends and gets of a row; passed to the model with its part of the row."""

    group: SequenceGroup
    features: dict[str, int]
    """``image`` and ``video`` -> the number of features (merged tokens) of this rank's own frames."""
    order: Tensor
    """int64[own features]: their indices, sorted by the rank that gets them."""
    sends: list[int]
    """int[N], the number of features that each rank gets from this one."""
    receives: list[int]
    """int[N], the number of features that this rank gets from each."""
    tokens: Tensor
    """int64[sum(receives)]: index, in this rank's part of the row, of the token of each feature that it gets."""

    def map(self, function: Callable[[Tensor], Tensor]) -> RowShare:
        """Return a copy with the results of a function of each tensor, for example on another device."""
        return replace(self, order=function(self.order), tokens=function(self.tokens))

    def gather(self, features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Exchange the features of the own frames for those of the own tokens, with gradients.

        Args:
            features: for each kind of ``self.features``, the levels of features, ``[at least its own, D]`` each: of the
                input embeddings, then of each deepstack layer.

        Returns:
            The same levels, ``[len(tokens), D]`` each, in the order of ``tokens``.
        """
        own = [[level[:count] for level in kind] for kind, count in zip(features, self.features.values(), strict=True)]
        levels = [torch.cat(kinds) for kinds in zip(*own, strict=True)]
        rows = torch.cat(levels, dim=1).index_select(0, self.order)
        gathered = _exchange(rows, self.sends, self.receives, self.group.ranks)
        return list(gathered.chunk(len(levels), dim=1))


def exchange_heads(text_config: Any) -> None:
    """Let the attention of a text model accept a `RowShare`: it exchanges heads for tokens around the kernel.

    Calls without one, such as those of the vision tower and of generation, are not changed.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention_of(text_config)
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(function, SHARE):
        AttentionInterface.register(name, _exchanging(function))


def _exchanging(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function of transformers' interface, ``[1, H, t, D]`` -> ``[1, t, H, D]``."""

    @functools.wraps(function)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        share: RowShare | None = options.pop(SHARE, None)
        if share is None:
            result: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, **options)
            return result
        if attention_mask is not None:
            raise ValueError("a row that is shared by several ranks has no attention mask")
        group = share.group
        options.pop("position_ids", None)  # of the own tokens; the kernel gets the borders of the whole row
        repeats = group.size // math.gcd(group.size, key.shape[1])
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        # Under autocast, queries and keys are still float32, and the kernel would convert them.
        query, key, value = (_to_heads(states.to(value.dtype), group) for states in (query, key, value))
        grouped = _with_groups(module, query.shape[1] // key.shape[1])
        out, _ = function(grouped, query, key, value, None, **options)  # [1, T, H / N, D]
        return _to_tokens(out, group), None

    setattr(attention, SHARE, True)
    return attention


def _with_groups(module: Any, groups: int) -> Any:
    """Return the attention module with this number of query heads for each key head, by which some kernels go."""
    if getattr(module, "num_key_value_groups", groups) == groups:
        return module
    changed = copy(module)
    changed.num_key_value_groups = groups
    return changed


def _to_heads(states: Tensor, group: SequenceGroup) -> Tensor:
    """Exchange the own tokens of all heads for all tokens of the own heads: [1, H, t, D] -> [1, H / N, T, D]."""
    by_rank = states[0].unflatten(0, (group.size, -1)).transpose(1, 2)  # [N, t, H / N, D]
    tokens = [by_rank.shape[1]] * group.size
    return _exchange(by_rank.flatten(0, 1), tokens, tokens, group.ranks).transpose(0, 1)[None]


def _to_tokens(states: Tensor, group: SequenceGroup) -> Tensor:
    """Exchange all tokens of the own heads for the own tokens of all heads: [1, T, H / N, D] -> [1, t, H, D]."""
    tokens = [states.shape[1] // group.size] * group.size
    by_rank = _exchange(states[0], tokens, tokens, group.ranks).unflatten(0, (group.size, -1))  # [N, t, H / N, D]
    return by_rank.transpose(0, 1).flatten(1, 2)[None]


def _exchange(rows: Tensor, sends: list[int], receives: list[int], ranks: Any) -> Tensor:
    """Send ``sends[p]`` rows to rank p, in order, and return the ``receives[p]`` rows from each; with gradients."""
    apply: Callable[..., Tensor] = _Exchange.apply
    return apply(rows, sends, receives, ranks)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], ranks: Any) -> Tensor:
        ctx.back = receives, sends, ranks
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receives, sends, group=ranks)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchange(gradient, *ctx.back), None, None, None


def own_group(size: int, timeout: timedelta | None = None, backend: str | None = None) -> Any:
    """Create groups of N consecutive ranks, and return the ``ProcessGroup`` of this rank. Every rank must call it."""
    firsts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(range(first, first + size), timeout=timeout, backend=backend) for first in firsts]
    return groups[dist.get_rank() // size]


def require_ranks(size: int, world_size: int) -> None:
    """Raise RecipeError unless the ranks of a run can be divided into groups of N."""
    if world_size % size:
        raise RecipeError(
            f"{KEY}={size} lets {size} processes share each row, but the run has {world_size}. Start a multiple of "
            f"{size} (accelerate launch --num_processes {size} ...), or change the key."
        )


def require_model(config: Any, attention: str, size: int) -> None:
    """Check that N ranks can share the rows of a model, before its weights are loaded.

    Args:
        config: the model's.
        attention: name of the implementation, not ``auto``.

    Raises:
        RecipeError: the model, its attention or its number of heads does not fit.
    """
    if not hasattr(getattr(config, "vision_config", None), "deepstack_visual_indexes"):
        raise RecipeError(f"{KEY}={size} is for Qwen3-VL, but the model is a {config.model_type}. Remove the key.")
    PLACES.require(f"{KEY}={size}")
    if attention in WITH_MASK:
        raise RecipeError(
            f"{KEY}={size} with model.attn_impl={attention} would need a mask of the whole row squared. Set "
            "model.attn_impl=auto or packed_sdpa."
        )
    heads = config.get_text_config().num_attention_heads
    if heads % size:
        fitting = ", ".join(str(count) for count in range(1, min(heads, 64) + 1) if heads % count == 0)
        raise RecipeError(f"{KEY}={size} does not divide the model's {heads} attention heads. Set one of {fitting}.")
