"""Borrowed: which function computes attention, by config; and the vision tower's way of handing borders over.

- ``config._attn_implementation`` (a property) and ``_attn_implementation_internal`` (what it reads), transformers 5.5
  to 5.24. The setter of the first walks into the parts of a config; the second sets one part alone.
  `PreTrainedModel.set_attn_implementation` is public, but takes a name with "flash" in it for a package to import.
- The vision tower hands ``cu_seqlens`` to the attention function only if the name of its implementation has "flash" in
  it (`transformers.utils.generic.is_flash_attention_requested`, 5.5 to 5.24). For any other name it asks the device
  for the lengths and calls the function once for each frame, in each layer.
- `torch.nn.attention.varlen.varlen_attn` is public, but young: torch 2.11 has it with a window, 2.12 with
  ``enable_gqa``.
- ``function._torchdynamo_disable``, by which torch 2.8 to 2.15 marks what `torch.compiler.disable` has wrapped.

Where the trick by name no longer works, the vision tower gets the text model's name: it attends frame by frame, which
is as exact and slower.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import Feature, installed, lacks, takes

VISION_SUFFIX = "_in_place_of_flash"
"""What makes the vision tower hand ``cu_seqlens`` to a function that is no flash-attention package."""

Value = TypeVar("Value")


def attention_of(config: Any) -> str:
    """The name of the attention implementation of one config, without its parts."""
    return str(config._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Set the implementation of one config, not of its parts; the name must be registered."""
    if attention_of(config) == name:
        return
    if hasattr(config, "_attn_implementation_internal"):
        config._attn_implementation_internal = name
    else:
        config._attn_implementation = name
    if attention_of(config) != name:
        raise RecipeError(
            f"{installed(('transformers',))} does not take the attention implementation {name!r} for a "
            f"{type(config).__name__}. Set model.attn_impl=sdpa, or install a version that docs/compatibility.md lists."
        )


def vision_name(text_name: str) -> str:
    """The name to register the vision tower's attention by: one that gets borders, where the trick works."""
    return text_name if BORDERS.missing() else text_name + VISION_SUFFIX


def without_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left out of what torch.compile compiles."""
    import torch

    if hasattr(function, "_torchdynamo_disable"):
        return function
    return torch.compiler.disable(function)


def varlen_kernel() -> Callable[..., Tensor]:
    """``varlen_attn`` of torch, which attends within samples of unequal lengths in one call on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    kernel: Any = varlen_attn
    return kernel


class KeptFor:
    """Values that belong to tensors, each for as long as its tensor lives.

    All layers of a pass get the same tensor of borders, so that what is computed of it is computed once.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def get(self, tensor: Tensor, make: Callable[[], Value]) -> Value:
        """What was made for this very tensor before, or is made now."""
        key = id(tensor)
        kept = self._kept.get(key)
        if kept is not None and kept[0]() is tensor:
            return kept[1]
        value = make()
        self._kept[key] = weakref.ref(tensor, lambda _: self._kept.pop(key, None)), value
        return value


@cache
def _no_borders() -> str:
    missing = lacks("transformers.utils.generic", ("is_flash_attention_requested",))
    if missing:
        return missing
    from transformers import PreTrainedConfig
    from transformers.utils.generic import is_flash_attention_requested

    config = PreTrainedConfig()
    reason = lacks(config, ("_attn_implementation", "_attn_implementation_internal"))
    if reason:
        return reason
    config._attn_implementation_internal = "packed" + VISION_SUFFIX
    try:
        requested = is_flash_attention_requested(config)
    except (TypeError, AttributeError, ValueError) as error:
        return f"has another is_flash_attention_requested ({error})"
    return "" if requested else "does not take a registered function for flash-attention by its name"


BORDERS = Feature(
    name="vision attention over all frames in one call",
    packages=("transformers",),
    missing=_no_borders,
    instead="the vision tower attends frame by frame and waits for the device in each layer",
)


@cache
def _no_varlen() -> str:
    if missing := lacks("torch.nn.attention.varlen", ("varlen_attn",)):
        return missing
    known = "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"
    return takes(varlen_kernel(), *known, "scale", "window_size")


VARLEN = Feature(
    name="torch's attention kernel for unequal lengths",
    packages=("torch",),
    missing=_no_varlen,
    instead="attn_impl=packed_sdpa calls SDPA once for each length in a row; flash-attention does not need it",
)
FEATURES = (BORDERS, VARLEN)
