"""Selects an implementation of MoE experts that runs on this machine: grouped matrix products, or one after another.

Relies on the functions behind transformers' default: transformers 5.5 to 5.24 calls ``torch.nn.functional.grouped_mm``
(torch 2.10 and later) or ``torch._grouped_mm`` (before) wherever one of them exists, even if it has no kernel for the
device: torch 2.8 has none for a CPU. So it is tried once, and if it fails, models are loaded with
``experts_implementation="eager"`` (public), which runs one expert after another.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_ft.upstream.probe import installed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def experts_implementation(config: PreTrainedConfig, dtype: str) -> dict[str, str]:
    """Return the arguments of `from_pretrained` that select a model's expert implementation; empty for the default.

    Args:
        dtype: name of the weights' dtype; a string that is not a dtype name, such as ``auto``, is treated as
            ``bfloat16``.
    """
    if not hasattr(config.get_text_config(), "num_experts"):
        return {}
    kind = getattr(torch, dtype, None)
    missing = no_grouped_product(kind if isinstance(kind, torch.dtype) else torch.bfloat16)
    if not missing:
        return {}
    logger.warning("%s %s: experts run one after another, which is slower", installed(("torch",)), missing)
    return {"experts_implementation": "eager"}


@cache
def no_grouped_product(dtype: torch.dtype) -> str:
    """Return the reason why grouped products do not run on this machine's device; empty if they do."""
    product: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        return ""  # transformers then uses a loop of its own
    device = _device()
    try:
        rows = torch.ones(16, 16, dtype=dtype, device=device)
        product(rows, rows[None].repeat(2, 1, 1), offs=torch.tensor([8, 16], dtype=torch.int32, device=device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return (
            f"has no grouped product of {str(dtype).removeprefix('torch.')} on {device.type} ({type(error).__name__})"
        )
    return ""


def _device() -> torch.device:
    """Return the device that this process will train on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK") or 0))
