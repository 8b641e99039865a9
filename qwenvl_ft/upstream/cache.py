"""Detects whether a forward pass of a transformers model continues from tokens of earlier passes.

Relies on the keyword arguments with which ``generate`` calls a model. The key-value cache is ``past_key_values`` up to
transformers 5.23 and ``cache`` since 5.24; a forward pre-hook sees the caller's name. So names are not used: any value
with ``get_seq_length`` (as the `Cache` classes of 5.5 to 5.24 have) counts as a cache, in an argument or one level
inside it. Without a cache, the pass continues earlier tokens if its mask is longer than its tokens or no sample begins
at position 0. If neither mask nor positions show it, an argument of an unknown type is an error, because it may be a
cache, and a wrong guess would silently change answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.errors import CheckpointError

LENGTH = "get_seq_length"
"""Method of a cache that returns the number of tokens it holds."""
SETTLED = ("labels", "cu_seq_lens_q")
"""Arguments of passes that train on or evaluate whole rows, which begin at a sample's first token."""


def continues(inputs: Mapping[str, Any]) -> bool:
    """Return True if earlier passes have seen tokens that precede those of ``inputs``, a model's named arguments.

    Raises:
        CheckpointError: this transformers passes an argument of an unknown type, which may be a cache.
    """
    lengths = [cache.get_seq_length() for value in inputs.values() for cache in _caches(value)]
    if lengths:
        return any(bool(torch.as_tensor(length).max() > 0) for length in lengths)
    if any(_argument(inputs, name) is not None for name in SETTLED) or _argument(inputs, "use_cache") is False:
        return False
    shape = (inputs["input_ids"] if _argument(inputs, "input_ids") is not None else inputs["inputs_embeds"]).shape
    mask, positions = _argument(inputs, "attention_mask"), _argument(inputs, "position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > shape[1]:
        return True
    if isinstance(positions, Tensor):
        return _begins_later(positions, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    unknown = [name for name, value in inputs.items() if not _plain(value)]
    if unknown:
        import transformers

        kind = type(inputs[unknown[0]]).__name__
        raise CheckpointError(
            f"transformers {transformers.__version__} calls the model with {unknown[0]}, a {kind} that is not known "
            "here: it may hold earlier tokens, and ReFT could edit wrong positions. Install transformers 5.24 or older."
        )
    return False


def named(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a model's call by name, from those that a forward pre-hook gets."""
    if not args:
        return dict(kwargs)
    from inspect import signature

    return dict(zip(signature(model.forward).parameters, args, strict=False)) | dict(kwargs)


def _begins_later(positions: Tensor, mask: Tensor | None) -> bool:
    """Return True if no row's first token (other than padding) is at position 0.

    Positions are the text row, or the temporal one if there are three.
    """
    text = (positions[0] if positions.ndim == 3 else positions).long()  # [B, T]
    if mask is None:
        return bool((text[:, 0] > 0).all())
    first = mask[:, -text.shape[1] :].long().argmax(dim=1, keepdim=True)
    return bool((text.gather(1, first.to(text.device)) > 0).all())


def _argument(inputs: Mapping[str, Any], name: str) -> Any:
    return inputs[name] if name in inputs else None


def _caches(value: Any) -> Iterator[Any]:
    """Yield the value itself if it is a cache, or the caches one level inside it."""
    held: list[Any] = [value]
    if hasattr(value, LENGTH):
        pass
    elif isinstance(value, Mapping):
        held = list(value.values())
    elif isinstance(value, list | tuple):
        held = list(value)
    elif not _plain(value) and hasattr(value, "__dict__"):
        held = list(vars(value).values())
    yield from (inner for inner in held if hasattr(inner, LENGTH) and not isinstance(inner, type))


def _plain(value: Any) -> bool:
    """Return True for types that cannot be a cache: tensors, numbers, text and the like, also in containers."""
    if isinstance(value, Mapping):
        return all(_plain(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(_plain(inner) for inner in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str | Enum | torch.dtype | torch.device)
