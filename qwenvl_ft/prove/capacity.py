"""Estimates the memory and disk space of a proof, and measures what is free."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import nn

GIB = 1024**3
SLACK = 2 * GIB
"""Bytes for activations and logits of a few short samples."""


def free_memory(device: torch.device) -> int:
    """Return free bytes of a device, including memory that torch has reserved but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of all weights, as they are or with floating-point weights in ``dtype``."""
    return sum(
        p.numel() * (dtype.itemsize if dtype is not None and p.is_floating_point() else p.itemsize)
        for p in model.parameters()
    )


def training_bytes(model: nn.Module) -> int:
    """Return the bytes of gradients and of AdamW's two states."""
    return sum(p.numel() * (p.itemsize + 8) for p in model.parameters() if p.requires_grad)


def shortages(model: nn.Module, device: torch.device, folder: Path) -> Iterator[str]:
    """Yield a warning if memory, and one if disk space, may be too small; the model must be on its device already."""
    needed, free = training_bytes(model) + SLACK, free_memory(device)
    if needed > free:
        yield (
            f"training takes about {needed / GIB:.1f} GiB beside the weights, and {free / GIB:.1f} GiB of {device} are "
            "free. If that fails, use a smaller model or freeze more"
        )
    trained = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    whole = weight_bytes(model)
    disk = whole if trained > whole / 2 else trained + whole
    left = free_disk(folder)
    if disk > left:
        yield (
            f"the saved and the merged model take about {disk / GIB:.1f} GiB, and {left / GIB:.1f} GiB are "
            f"free in {folder.parent}. Choose another --folder, or add --skip merged"
        )


def float32_place(model: nn.Module, device: torch.device) -> torch.device | None:
    """Return the device whose free memory holds the weights in float32: ``device``, the CPU, or None."""
    more = weight_bytes(model, torch.float32) - weight_bytes(model)
    if more + SLACK <= free_memory(device):
        return device
    cpu = torch.device("cpu")
    if device.type != "cpu" and weight_bytes(model, torch.float32) + SLACK <= free_memory(cpu):
        return cpu
    return None
