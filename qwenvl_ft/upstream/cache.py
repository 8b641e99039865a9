"""Whether a forward pass of a transformers model goes on from tokens of earlier passes.

Borrowed: the keyword arguments by which ``generate`` calls a model. The key-value cache is ``past_key_values`` up to
transformers 5.23 and ``cache`` from 5.24 on; a forward pre-hook sees the caller's name. So no name is used: a cache is
whatever has ``get_seq_length`` (the `Cache` classes of 5.5 to 5.24 do), in an argument or one level inside it. Where
none is found, the pass goes on from earlier tokens if its mask is longer than its tokens or if no sample begins at
position 0. Where that cannot be known either, and an argument of an unknown kind is passed, which may be a cache, it is
an error: a wrong guess would change answers without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.errors import CheckpointError

LENGTH = "get_seq_length"
"""Method of a cache: how many tokens it holds."""
SETTLED = ("labels", "cu_seq_lens_q")
"""Arguments of passes that train or evaluate rows: these begin at a sample's first token."""


def continues(inputs: Mapping[str, Any]) -> bool:
    """Whether earlier passes have seen tokens that come before those of ``inputs``, a model's named arguments.

    Raises:
        CheckpointError: this transformers calls the model in a way from which it cannot be known.
    """
    lengths = [cache.get_seq_length() for value in inputs.values() for cache in _caches(value)]
    if lengths:
        return any(bool(torch.as_tensor(length).max() > 0) for length in lengths)
    if any(_given(inputs, name) is not None for name in SETTLED) or _given(inputs, "use_cache") is False:
        return False
    shape = (inputs["input_ids"] if _given(inputs, "input_ids") is not None else inputs["inputs_embeds"]).shape
    mask, positions = _given(inputs, "attention_mask"), _given(inputs, "position_ids")
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
            "here: it may hold earlier tokens, and edits could go astray. Install transformers 5.24 or older."
        )
    return False


def named(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, as a forward pre-hook sees them."""
    if not args:
        return dict(kwargs)
    from inspect import signature

    return dict(zip(signature(model.forward).parameters, args, strict=False)) | dict(kwargs)


def _begins_later(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether the first real token of every row is at another position than 0; text's, or time's of three rows."""
    text = (positions[0] if positions.ndim == 3 else positions).long()  # [B, T]
    if mask is None:
        return bool((text[:, 0] > 0).all())
    first = mask[:, -text.shape[1] :].long().argmax(dim=1, keepdim=True)
    return bool((text.gather(1, first.to(text.device)) > 0).all())


def _given(inputs: Mapping[str, Any], name: str) -> Any:
    return inputs[name] if name in inputs else None


def _caches(value: Any) -> Iterator[Any]:
    """The cache that a value is, or those that it holds, one level deep."""
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
    """Whether a value is of a kind that holds no earlier tokens by itself."""
    if isinstance(value, Mapping):
        return all(_plain(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(_plain(inner) for inner in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str | Enum | torch.dtype | torch.device)
