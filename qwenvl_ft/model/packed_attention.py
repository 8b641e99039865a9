"""Attention over packed rows with torch alone (``attn_impl: packed_sdpa``): its varlen kernel, or SDPA on each sample.

On CUDA in 16 bits, `torch.nn.attention.varlen.varlen_attn` computes all samples in one call. Elsewhere, the samples of
one length are one SDPA call.

transformers' own SDPA builds a T x T mask for a packed row, and calls the vision attention once per image and layer.
Here there is no mask, and the cost grows with the sum of squared sample lengths. The start of each sample comes from
``cu_seq_lens_q`` (int32[S+1]) if the batch has it, as the batches of `QwenVLCollator` do; otherwise a sample starts
wherever the text row of ``position_ids`` (int64[4, 1, T]) does not go up by one. With an ``attention_mask`` or a
key-value cache, as in generation, plain SDPA runs.

Letters: B rows, T tokens of a row, S samples in it, H heads, D head size; n samples of l tokens are one SDPA call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.upstream.attention import VARLEN, TensorCache, set_attention, varlen_kernel, vision_name

TEXT_NAME = "packed_sdpa"


@dataclass(frozen=True)
class Plan:
    """Groups the samples of a flat row by length, for one SDPA call per group."""

    groups: list[tuple[int, int]]
    """(n, l) of each group, in the order of ``order``."""

    order: Tensor | None
    """int64[T], indices of the tokens sorted by group; None if they are in that order already."""

    inverse: Tensor | None
    """int64[T], the inverse permutation of ``order``."""

    @property
    def is_one_sample(self) -> bool:
        return self.groups[0][0] == 1 and len(self.groups) == 1


def make_plan(lengths: list[int], device: torch.device | str = "cpu") -> Plan:
    """Group the samples of a row by length.

    Example:
        Lengths 3, 2, 3 give groups ``[(2, 3), (1, 2)]`` and the order ``[0, 1, 2, 5, 6, 7, 3, 4]``.
    """
    starts: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        if length:
            starts.setdefault(length, []).append(start)
        start += length
    groups = [(len(firsts), length) for length, firsts in starts.items()]
    flat = [first for firsts in starts.values() for first in firsts]
    if flat == sorted(flat):
        return Plan(groups, None, None)
    pieces = [torch.arange(length)[None] + torch.tensor(firsts)[:, None] for length, firsts in starts.items()]
    order = torch.cat([piece.flatten() for piece in pieces])
    return Plan(groups, order.to(device), torch.argsort(order).to(device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface, ``[B, H, T, D]`` -> ``[B, T, H, D]``, in which samples are isolated."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, _ = query.shape
    value = _separate(value)
    if attention_mask is None and key.shape[2] == tokens:
        dtype = _kernel_dtype(value) if rows == 1 and cu_seq_lens_q is not None and max_length_q else None
        if dtype is not None and not kwargs.get("dropout"):
            flat = [x[0].transpose(0, 1).to(dtype) for x in (query, key, value)]  # [T, H, D]
            return _varlen(module, flat, cu_seq_lens_q, max_length_q, kwargs)[None], None
        plan = _plan_of(cu_seq_lens_q, position_ids, rows, tokens)
        if plan is not None and not plan.is_one_sample:
            flat = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]  # [H, B * T, D]
            out = by_groups(module, flat, plan, kwargs)  # [B * T, H, D]
            return out.view(rows, tokens, heads, out.shape[-1]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _separate(value: Tensor) -> Tensor:
    """Copy values ``[B, H, T, D]`` that share a block of memory with queries and keys, as the vision tower's do.

    The backward pass keeps the values, and would otherwise keep the whole block, three times as large.
    """
    _, heads, _, size = value.shape
    return value.transpose(1, 2).contiguous().transpose(1, 2) if value.stride(2) > heads * size else value


def packed_mask(*, attention_mask: Tensor | None, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Return no mask for a packed row, and SDPA's mask for padded rows and for a key-value cache."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **kwargs)


def use_packed_attention(model: Any) -> None:
    """Use `packed_attention` in the text model and the vision tower of a loaded model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    of_vision = vision_name(TEXT_NAME)
    for name in (TEXT_NAME, of_vision):
        AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(TEXT_NAME, packed_mask)
    for config, name in (
        (model.config, TEXT_NAME),
        (model.config.text_config, TEXT_NAME),
        (model.config.vision_config, of_vision),
    ):
        set_attention(config, name)


def _kernel_dtype(value: Tensor) -> torch.dtype | None:
    """Return the dtype in which the varlen kernel computes; None if it cannot run."""
    if not value.is_cuda or torch.cuda.get_device_capability(value.device)[0] < 8 or _kernel() is None:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _kernel() -> Callable[..., Tensor] | None:
    """Return torch's varlen kernel; None if the installed torch has none with the expected parameters."""
    return None if VARLEN.missing() else varlen_kernel()


@cache
def _takes_groups(kernel: Callable[..., Tensor]) -> bool:
    """Return True if the kernel supports grouped-query attention; torch 2.11's does not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _varlen(
    module: nn.Module, flat: list[Tensor], borders: Tensor | None, longest: int | None, kwargs: dict[str, Any]
) -> Tensor:
    """Compute all samples in one call: three ``[T, H, D]`` -> ``[T, H, D]``. Keys and values may have fewer heads."""
    kernel = _kernel()
    assert kernel is not None
    query, key, value = flat
    if isinstance(longest, Tensor) and borders is not None:  # the vision tower's, before transformers 5.15
        longest = _LONGEST.get(borders, lambda: int(borders.diff().max()))
    options: dict[str, Any] = {"scale": kwargs.get("scaling")}
    is_causal = kwargs.get("is_causal")
    if is_causal if is_causal is not None else getattr(module, "is_causal", True):
        options["window_size"] = (-1, 0)
    if key.shape[1] != query.shape[1]:
        if _takes_groups(kernel):
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # cuDNN requires the same tensor for both boundaries.
    return kernel(query, key, value, borders, borders, longest, longest, **options)


_PLANS = TensorCache()
_LONGEST = TensorCache()


def _plan_of(cu_seqlens: Tensor | None, position_ids: Tensor | None, rows: int, tokens: int) -> Plan | None:
    """Return the plan of a row. All layers get the same boundary tensor, so the plan is made once and cached for it."""
    source = cu_seqlens if cu_seqlens is not None else position_ids
    if source is None:
        return None
    return _PLANS.get(source, lambda: make_plan(sample_lengths(cu_seqlens, position_ids, rows, tokens), source.device))


def sample_lengths(cu_seqlens: Tensor | None, position_ids: Tensor | None, rows: int, tokens: int) -> list[int]:
    """Return the lengths of the samples in ``B * T`` tokens. Without boundaries and positions, a row is one sample.

    Raises:
        ValueError: the lengths do not add up to ``B * T``.
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
    else:
        lengths = [tokens] * rows if position_ids is None else _lengths(position_ids, rows, tokens)
    if sum(lengths) != rows * tokens:
        raise ValueError(f"sample lengths add up to {sum(lengths)}, but the batch has {rows} x {tokens} tokens")
    return lengths


def _lengths(position_ids: Tensor, rows: int, tokens: int) -> list[int]:
    """Return sample lengths from ``position_ids`` [B or 1, T]: a sample begins at each row and each jump."""
    begins = torch.ones(rows, tokens, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.expand(rows, -1).diff() != 1
    starts = begins.flatten().nonzero().flatten()
    return starts.diff(append=starts.new_tensor([rows * tokens])).tolist()


def by_groups(module: nn.Module, flat: list[Tensor], plan: Plan, kwargs: dict[str, Any]) -> Tensor:
    """Run SDPA on each group of samples of one length: three ``[H, T, D]`` -> ``[T, H, D]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if plan.order is not None:
        flat = [x.index_select(1, plan.order) for x in flat]
    sizes = [count * length for count, length in plan.groups]
    outs = []
    for (count, length), *parts in zip(plan.groups, *(x.split(sizes, dim=1) for x in flat), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)  # [n, H, l, D]
        outs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))  # [n * l, H, D]
    out = torch.cat(outs)
    return out if plan.inverse is None else out.index_select(0, plan.inverse)
