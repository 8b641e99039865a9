"""Computes the reference of all comparisons: each sample alone, as exactly as memory allows.

A run in float32 is its own reference. For a run in 16 bits the same weights are converted to float32, on the device, or
on the CPU if the device is too small. If neither has enough memory, the reference is a different attention
implementation in 16 bits: it rounds differently, which shows how large rounding errors are.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qwenvl_ft.model.choose_attention import resolve_attn_impl
from qwenvl_ft.prove.capacity import GIB, float32_place, weight_bytes
from qwenvl_ft.prove.measure import Measured, alone_rows, measured
from qwenvl_ft.prove.subject import Subject


def measure_alone(subject: Subject) -> None:
    """Measure each sample alone, in the run's own precision."""
    subject.say(f"{len(subject.samples)} samples one by one")
    subject.alone = measured(
        subject.model, alone_rows(subject), autocast=subject.autocast, device=subject.device, share=subject.share
    )


def measure_reference(subject: Subject) -> None:
    """Measure the reference. This changes the model's precision or attention."""
    assert subject.alone is not None
    if subject.dtype == torch.float32:
        subject.reference, subject.facts["reference"] = subject.alone, "each sample alone in float32"
        return
    model: Any = subject.model
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    place = None if spread else float32_place(model, subject.device)
    if place is None:
        need = weight_bytes(model, torch.float32) / GIB
        subject.say(f"no memory for {need:.1f} GiB of float32 weights: the reference is eager attention in 16 bits")
        use_attention(model, "eager")
        subject.reference = _measured(subject, subject.device, subject.autocast)
        subject.facts["reference"] = "each sample alone, eager attention in 16 bits (not enough memory for float32)"
        return
    subject.say(f"{len(subject.samples)} samples one by one in float32 on {place}")
    if place.type != subject.device.type:
        model.to(place)
    to_float32(model)
    if attention_of(subject).startswith("flash"):  # its kernels take 16 bits only
        use_attention(model, "sdpa")
    subject.reference = _measured(subject, place, nullcontext)
    subject.facts["reference"] = f"each sample alone in float32 on {place.type}"


def _measured(subject: Subject, device: torch.device, autocast: Any) -> Measured:
    return measured(subject.model, alone_rows(subject), autocast=autocast, device=device, share=subject.share)


def to_float32(model: nn.Module) -> None:
    """Convert all floating-point weights to float32 one at a time; quantised layers compute in float32."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in model.modules():
        layer: Any = module
        if isinstance(getattr(layer, "compute_dtype", None), torch.dtype):  # bitsandbytes
            layer.compute_dtype = torch.float32


def attention_of(subject: Subject) -> str:
    """Return the name of the run's attention implementation."""
    settings = subject.recipe.model
    return resolve_attn_impl(settings.attn_impl, str(subject.dtype).removeprefix("torch."))


def use_attention(model: nn.Module, name: str) -> None:
    """Switch all parts of a model to the attention implementation ``name``."""
    from transformers import PreTrainedModel

    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.set_attn_implementation(name)
