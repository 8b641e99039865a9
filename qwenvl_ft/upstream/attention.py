"""Sets the attention function of a single config, under a name for which the vision tower passes sample boundaries.

Relies on:

- ``config._attn_implementation`` (a property) and ``_attn_implementation_internal`` (the attribute that it reads),
  transformers 5.5 to 5.24. The property's setter also changes the sub-configs; the attribute changes one config alone.
  `PreTrainedModel.set_attn_implementation` is public, but treats a name that contains "flash" as a package to import.
- The vision tower passes ``cu_seqlens`` to the attention function only if the implementation's name contains "flash"
  (`transformers.utils.generic.is_flash_attention_requested`, 5.5 to 5.24). For any other name it reads the lengths from
  the device and calls the function once per frame, in each layer.
- `torch.nn.attention.varlen.varlen_attn` is public but new: it has ``window_size`` since torch 2.11 and ``enable_gqa``
  since 2.12.
- ``function._torchdynamo_disable``, with which torch 2.8 to 2.15 marks functions wrapped by `torch.compiler.disable`.

If a name with "flash" no longer has this effect, the vision tower gets the text model's name and attends frame by
frame: equally exact, but slower.
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
"""Name suffix that makes the vision tower pass ``cu_seqlens`` to a function of this package."""

Value = TypeVar("Value")


def attention_of(config: Any) -> str:
    """Return the name of one config's attention implementation; sub-configs may have others."""
    return str(config._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Set the attention implementation of one config, without its sub-configs.

    Args:
        name: a registered implementation.

    Raises:
        RecipeError: this transformers does not accept it.
    """
    if attention_of(config) == name:
        return
    if hasattr(config, "_attn_implementation_internal"):
        config._attn_implementation_internal = name
    else:
        config._attn_implementation = name
    if attention_of(config) != name:
        raise RecipeError(
            f"{installed(('transformers',))} does not accept the attention implementation {name!r} for a "
            f"{type(config).__name__}. Set model.attn_impl=sdpa, or install a version that docs/compatibility.md lists."
        )


def vision_name(text_name: str) -> str:
    """Return the name under which to register the vision tower's attention, so that it gets ``cu_seqlens``."""
    return text_name if BORDERS.missing() else text_name + VISION_SUFFIX


def without_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function wrapped so that torch.compile does not compile it."""
    import torch

    if hasattr(function, "_torchdynamo_disable"):
        return function
    return torch.compiler.disable(function)


def varlen_kernel() -> Callable[..., Tensor]:
    """Return torch's ``varlen_attn``, which computes attention in samples of unequal lengths in one call on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    kernel: Any = varlen_attn
    return kernel


class TensorCache:
    """A cache of values by tensor identity; an entry lives as long as its tensor.

    All layers of a pass get the same boundary tensor, so values derived from it are computed once.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def get(self, tensor: Tensor, make: Callable[[], Value]) -> Value:
        """Return the value for this tensor object; compute it on the first call."""
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
    return "" if requested else "does not treat a registered function as flash-attention because of its name"


BORDERS = Feature(
    name="vision attention over all frames in one call",
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
    name="torch's variable-length attention kernel",
    packages=("torch",),
    missing=_no_varlen,
    instead="attn_impl=packed_sdpa calls SDPA once for each length in a row; flash-attention does not need it",
)
FEATURES = (BORDERS, VARLEN)
