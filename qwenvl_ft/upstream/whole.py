"""Gives the shape and size of a parameter as one process without an engine sees them.

Relies on two attributes that other libraries set on parameters, which are not private, but not documented either:

- ``ds_shape``: DeepSpeed ZeRO-3 (0.14 to 0.19) replaces a parameter's values by an empty tensor, and keeps the shape
  here.
- ``quant_state.shape``: bitsandbytes (0.43 to 0.50) packs two weights of 4 bits into each byte of a column.

A parameter without them has its own shape, also the DTensor of FSDP2, whose shape is that of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import RecipeError


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a whole parameter, whether or not it is partitioned or packed."""
    held: Any = parameter
    if hasattr(held, "ds_shape"):
        return torch.Size(held.ds_shape)
    state: Any = getattr(held, "quant_state", None)
    return torch.Size(state.shape) if hasattr(state, "shape") else parameter.shape


def full_size(parameter: Tensor) -> int:
    """Return the number of weights of a whole parameter, whether or not it is partitioned or packed."""
    return full_shape(parameter).numel()


def is_partitioned(parameter: Tensor) -> bool:
    """Return True if ZeRO-3 holds the parameter in parts."""
    return hasattr(parameter, "ds_shape")


def require_whole_weights(model: nn.Module, key: str) -> None:
    """Raise if ZeRO-3 has sharded the weights, for methods that compute with whole ones or copy them.

    Args:
        key: the setting of ``tuner`` that needs whole weights, for the error.

    Raises:
        RecipeError: the weights are sharded.
    """
    if any(map(is_partitioned, model.parameters())):
        raise RecipeError(f"tuner.{key} needs whole weights, but ZeRO-3 has sharded them. Use zero2, or no DeepSpeed.")
