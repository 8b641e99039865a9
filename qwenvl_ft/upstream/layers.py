"""Replaces a module's forward in place, so that names, weights, hooks and saved files do not change.

Relies on:

- A module's ``forward`` (an instance attribute takes precedence over the class's method) and ``__class__``: plain
  Python, any version.
- ``layer._gradient_checkpointing_func``, with which transformers 5.5 to 5.24 recomputes a `GradientCheckpointingLayer`.
  Up to 5.21 the layer's ``__call__`` does so, around its hooks and its forward. Since 5.23 a wrapper around the class's
  ``forward`` does, whose ``__wrapped__`` is the plain one.
- ``torch._dynamo.config.recompile_limit``, torch 2.6 to 2.15.
- The rotary embedding of transformers' attention layers is a global name of their module, ``apply_rotary_pos_emb``, up
  to 5.24. A copy of the forward's code with another value for that name is the same forward with another rotation.

If layers cannot be compiled one by one, `COMPILED` refuses ``torch_compile``. If the rotation is not a global name,
`with_rotation` returns None and the layer keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_ft.upstream.probe import Feature, takes

ROTATION = "apply_rotary_pos_emb"
RECOMPUTE = "_gradient_checkpointing_func"


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace a module's forward by another callable."""
    module.forward = forward  # type: ignore[method-assign]


def replaced_forward(module: nn.Module) -> Any:
    """Return the replacement of a module's forward, ours or another library's; None if its class's forward runs."""
    return vars(module)["forward"] if "forward" in vars(module) else None


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`."""
    del module.forward


def is_plain_linear(forward: Any) -> bool:
    """Return True if a bound forward is `nn.Linear`'s."""
    return getattr(forward, "__func__", None) is nn.Linear.forward


def owner_of(forward: Any) -> Any:
    """Return the module that a forward is bound to; None if it is unbound."""
    return getattr(forward, "__self__", None)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Turn a module into an instance of a subclass of its class; it keeps its parameters, hooks and place."""
    module.__class__ = kind


def with_rotation(module: nn.Module, rotation: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return an attention layer's forward with another rotation; None for modules without a rotation."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return None
    while hasattr(forward, "__wrapped__") and ROTATION not in forward.__code__.co_names:
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    names = forward.__globals__ | {ROTATION: rotation}
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copied, module)


def plain_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return a layer's forward without wrappers, such as the one with which transformers recomputes it."""
    forward = kind.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def call_layer(layer: Any, compute: Callable[..., Tensor], hidden: Tensor, options: dict[str, Any]) -> Tensor:
    """Run ``compute(layer, hidden, **options)`` in place of a layer's forward, with activation checkpointing if the
    layer uses it."""
    inside = layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()
    if inside and not _recomputes_around_forward():
        return getattr(layer, RECOMPUTE)(partial(compute, layer, **options), hidden)
    return compute(layer, hidden, **options)


@cache
def _recomputes_around_forward() -> bool:
    """Return True if a layer's ``__call__`` handles checkpointing, so that a replaced forward need not."""
    return "__call__" in vars(GradientCheckpointingLayer)


def allow_recompiling(times: int) -> None:
    """Raise the number of times that torch recompiles one function before it gives up."""
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    config.recompile_limit = max(config.recompile_limit, times)


@cache
def _not_compiled() -> str:
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    if not hasattr(config, "recompile_limit"):
        return "has no torch._dynamo.config.recompile_limit"
    try:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer as Layer
    except ImportError:
        return "has no Qwen3VLTextDecoderLayer"
    if not issubclass(Layer, GradientCheckpointingLayer):
        return "has a decoder layer that is not a GradientCheckpointingLayer"
    if not _recomputes_around_forward() and not hasattr(Layer.forward, "__wrapped__"):
        return "recomputes layers in another way"
    return takes(plain_forward(Layer), "hidden_states", "position_embeddings", "attention_mask", "position_ids")


COMPILED = Feature(
    name="compiling the language model's layers",
    packages=("transformers", "torch"),
    missing=_not_compiled,
)
FEATURES = (COMPILED,)
