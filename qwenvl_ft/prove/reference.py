"""What each sample is compared with: itself alone, as exactly as there is room for.

A run in float32 is its own reference. Of a run in 16 bits the very same weights are held in float32, on the device, or
on the CPU where the device is too small. Where neither has room, the reference is another way to compute attention in
16 bits: it rounds at other places, so that it shows how much rounding there is.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qwenvl_ft.model.attention import resolve_attn_impl
from qwenvl_ft.prove.measure import Measured, alone_rows, measured
from qwenvl_ft.prove.room import GIB, float32_place, weight_bytes
from qwenvl_ft.prove.subject import Subject


def measure_alone(subject: Subject) -> None:
    """Each sample by itself, in the run's own precision."""
    subject.say(f"{len(subject.samples)} samples one by one")
    subject.alone = measured(
        subject.model, alone_rows(subject), autocast=subject.autocast, device=subject.device, share=subject.share
    )


def measure_reference(subject: Subject) -> None:
    """The reference. The model is not what it was afterwards."""
    assert subject.alone is not None
    if subject.dtype == torch.float32:
        subject.reference, subject.facts["reference"] = subject.alone, "each sample alone in float32"
        return
    model: Any = subject.model
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    place = None if spread else float32_place(model, subject.device)
    if place is None:
        need = weight_bytes(model, torch.float32) / GIB
        subject.say(f"no room for {need:.1f} GiB of weights in float32: eager attention in 16 bits is the reference")
        use_attention(model, "eager")
        subject.reference = _measured(subject, subject.device, subject.autocast)
        subject.facts["reference"] = "each sample alone by eager attention in 16 bits (no room for float32)"
        return
    subject.say(f"{len(subject.samples)} samples one by one in float32 on {place}")
    if place.type != subject.device.type:
        model.to(place)
    to_float32(model)
    if attention_of(subject).startswith("flash"):  # its kernels know 16 bits only
        use_attention(model, "sdpa")
    subject.reference = _measured(subject, place, nullcontext)
    subject.facts["reference"] = f"each sample alone in float32 on {place.type}"


def _measured(subject: Subject, device: torch.device, autocast: Any) -> Measured:
    return measured(subject.model, alone_rows(subject), autocast=autocast, device=device, share=subject.share)


def to_float32(model: nn.Module) -> None:
    """Hold all weights of floating point in float32, one at a time; those in few bits compute in it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in model.modules():
        layer: Any = module
        if isinstance(getattr(layer, "compute_dtype", None), torch.dtype):  # bitsandbytes
            layer.compute_dtype = torch.float32


def attention_of(subject: Subject) -> str:
    """What computes attention in the run."""
    settings = subject.recipe.model
    return resolve_attn_impl(settings.attn_impl, str(subject.dtype).removeprefix("torch."))


def use_attention(model: nn.Module, name: str) -> None:
    """Let all parts of a model compute attention in another way."""
    from transformers import PreTrainedModel

    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.set_attn_implementation(name)
