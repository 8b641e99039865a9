"""LongLoRA (Chen and others 2023, arXiv 2309.12307): LoRA for long samples, with attention in shifted groups.

In training, half of the heads attend within groups of G tokens, and the other half within groups shifted by G / 2, so
that neighbouring groups exchange information. Groups start at each sample's first token and end with the sample: no
token sees another sample, and a packed sample is computed as it is alone. The last group and the first shifted group
are shorter; the paper's figure joins them instead, but then early tokens would see late ones. A sample of at most G
tokens has one group. Attention is full in evaluation and generation, and the checkpoint is an ordinary LoRA adapter.

Besides LoRA, the paper trains embeddings and normalisation layers. They are saved in full beside the adapter.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.packed_attention import Plan, by_groups, make_plan, packed_attention, packed_mask, sample_lengths
from qwenvl_ft.tuning.methods.lora import build_lora, lora_place
from qwenvl_ft.tuning.targets import inside, saved_modules
from qwenvl_ft.upstream.attention import TensorCache, attention_of, set_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)


def build_longlora(model: PreTrainedModel, tuner: TunerConfig, *, batches: Sequence[Any] | None = None) -> nn.Module:
    """Wrap the model with LoRA, and make the language model attend in shifted groups in training mode.

    Args:
        batches: see `build_lora`.

    Raises:
        RecipeError: the language model is frozen or has an odd number of key heads, or the group size is odd.
    """
    if tuner.freeze_llm:
        raise RecipeError("tuner.train_type=longlora adapts the language model. Set tuner.freeze_llm=false.")
    heads = model.config.get_text_config().num_key_value_heads
    if heads % 2:
        raise RecipeError(
            f"tuner.train_type=longlora needs an even number of key heads, but this model has {heads}. Use lora."
        )
    if tuner.longlora_group_size % 2:
        raise RecipeError(f"tuner.longlora_group_size={tuner.longlora_group_size} is odd. Set an even number.")
    if tuner.longlora_embeddings_and_norms:
        saved = saved_modules(model, tuner)
        more = [name for name in embeddings_and_norms(model) if not inside(name, saved)]
        tuner = replace(tuner, modules_to_save=[*saved, *more])
    use_shifted_attention(model, tuner.longlora_group_size)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return build_lora(model, tuner, batches=batches, tied_copies=tied and tuner.longlora_embeddings_and_norms)


def longlora_place(model: PreTrainedModel, tuner: TunerConfig) -> dict[str, Any]:
    """Return where LoRA goes, as `lora_place` does; tied embeddings may be trained, as copies."""
    return lora_place(model, tuner, tied_copies=True)


def embeddings_and_norms(model: nn.Module) -> list[str]:
    """Return the full names of the language model's embedding and normalisation layers."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith("model.language_model.")
        and (isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower())
    ]


def use_shifted_attention(model: PreTrainedModel, group_size: int) -> None:
    """Make the language model of a loaded model attend in shifted groups in training mode."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"longlora_{group_size}"
    AttentionInterface.register(name, partial(shifted_attention, group_size=group_size))
    AttentionMaskInterface.register(name, packed_mask)
    text = model.config.get_text_config()
    logger.info(
        "longlora: text attention runs torch's SDPA in groups of %d tokens, instead of %s",
        group_size,
        attention_of(text),
    )
    set_attention(text, name)


def shifted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_size: int,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface, ``[B, H, T, D]`` -> ``[B, T, H, D]``: grouped in training, else full."""
    rows, heads, tokens, _ = query.shape
    if not module.training or attention_mask is not None or key.shape[2] != tokens:
        borders = {"position_ids": position_ids, "cu_seq_lens_q": cu_seq_lens_q}
        return packed_attention(module, query, key, value, attention_mask, **(borders | kwargs))
    plans = _plans_of(cu_seq_lens_q, position_ids, rows, tokens, group_size, query.device)
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]  # [H, B * T, D]
    halves = zip(*(x.chunk(2) for x in flat), strict=True)
    outs = [by_groups(module, list(half), plan, kwargs) for half, plan in zip(halves, plans, strict=True)]
    out = torch.cat(outs, dim=1)  # [B * T, H, D]
    return out.view(rows, tokens, heads, out.shape[-1]), None


def group_lengths(length: int, group_size: int, *, shifted: bool) -> list[int]:
    """Return the sizes of the groups into which a sample of ``length`` tokens is cut for one half of the heads.

    Example:
        10 tokens in groups of 4: ``[4, 4, 2]``, and shifted ``[2, 4, 4]``; 4 tokens: ``[4]`` for both.
    """
    first = group_size // 2 if shifted and length > group_size else group_size
    borders = [0, *range(first, length, group_size), length]
    return [end - start for start, end in itertools.pairwise(borders)]


def _plans_of(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    rows: int,
    tokens: int,
    group_size: int,
    device: torch.device,
) -> list[Plan]:
    """Return the plans of both halves of the heads; all layers get the same tensor, so they are made once per pass."""
    source = cu_seqlens if cu_seqlens is not None else position_ids

    def make() -> list[Plan]:
        lengths = sample_lengths(cu_seqlens, position_ids, rows, tokens)
        halves = (
            [part for length in lengths for part in group_lengths(length, group_size, shifted=shifted)]
            for shifted in (False, True)
        )
        return [make_plan(parts, device) for parts in halves]

    if source is None:
        return make()
    plans: dict[int, list[Plan]] = _PLANS.get(source, dict)
    if group_size not in plans:
        plans[group_size] = make()
    return plans[group_size]


_PLANS = TensorCache()
"""Cache per boundary tensor: group size -> plans."""
