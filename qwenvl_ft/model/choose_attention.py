"""Chooses the attention implementation of a run.

``auto`` selects flash-attention if its package is installed and supports the CUDA device, else torch's own kernels
(packed_attention.py: the one for unequal lengths on CUDA in 16 bits, SDPA on each sample elsewhere). An implementation
that is named but unusable is an error with the command to install it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwenvl_ft.errors import RecipeError, unknown_name


@dataclass(frozen=True)
class Flash:
    """A flash-attention package."""

    install: str
    """Command that installs it."""
    capabilities: tuple[int, ...]
    """Major compute capabilities that it supports."""
    probe: str
    """Function of transformers that returns True if the package is installed."""

    def installed(self) -> bool:
        from transformers.utils import import_utils

        probe: Callable[[], bool] = getattr(import_utils, self.probe)
        return probe()


FLASH = {
    "flash_attention_3": Flash("build `hopper/` of Dao-AILab/flash-attention", (9,), "is_flash_attn_3_available"),
    "flash_attention_4": Flash("pip install flash-attn-4", (9, 10, 11), "is_flash_attn_4_available"),
    "flash_attention_2": Flash(
        "pip install flash-attn --no-build-isolation", (8, 9, 10, 11, 12), "is_flash_attn_2_available"
    ),
}
"""Name -> package; ``auto`` selects the first that is usable."""

BUILT_IN = ("sdpa", "packed_sdpa", "eager")
"""Implementations that need no package; ``packed_sdpa`` is `qwenvl_ft.model.packed_attention`."""

ALIASES = {"flash_attn": "flash_attention_2"}
ATTENTION_NAMES = ("auto", *ALIASES, *FLASH, *BUILT_IN)
"""Values of ``model.attn_impl``."""


def resolve_attn_impl(name: str, torch_dtype: str = "bfloat16") -> str:
    """Return the implementation to use for a value of ``model.attn_impl``.

    Args:
        name: one of ``ATTENTION_NAMES``.
        torch_dtype: dtype of the computation. Flash-attention supports 16 bits only, so ``auto`` selects SDPA for
            ``float32``.

    Raises:
        RecipeError: an unknown implementation, a missing package or device, or an unsupported dtype.
    """
    if name not in ATTENTION_NAMES:
        raise unknown_name("model.attn_impl", name, ATTENTION_NAMES)
    name = ALIASES.get(name, name)
    if name == "auto":
        usable = (flash for flash in FLASH if torch_dtype != "float32" and not obstacle(flash))
        return next(usable, "packed_sdpa")
    if name in FLASH:
        reason = obstacle(name)
        if not reason and torch_dtype == "float32":
            reason = "it computes in 16 bits; set model.torch_dtype=bfloat16"
        if reason:
            raise RecipeError(f"model.attn_impl={name} cannot be used: {reason}. Or set model.attn_impl=auto.")
    return name


def obstacle(name: str) -> str:
    """Return the reason why a flash implementation cannot run on this machine; empty if it can."""
    import torch

    flash = FLASH[name]
    if not torch.cuda.is_available():
        return f"it needs a CUDA device (there is none) and its package ({flash.install})"
    major, minor = torch.cuda.get_device_capability()
    if major not in flash.capabilities:
        return f"it does not run on compute capability {major}.{minor}"
    if not flash.installed():
        return f"its package is not installed ({flash.install})"
    return ""
