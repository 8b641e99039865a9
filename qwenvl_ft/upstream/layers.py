"""Borrowed: how a module computes. Its forward is replaced in place, so that names, weights, hooks and files stay.

- A module's ``forward`` (an instance attribute before the class's method) and ``__class__``: plain Python, any version.
- ``layer._gradient_checkpointing_func``, by which a `GradientCheckpointingLayer` is computed again, transformers 5.5 to
  5.24. Up to 5.21 the layer's ``__call__`` does so around its hooks and its forward; from 5.23 on a wrapper around the
  class's ``forward``, below which ``__wrapped__`` leads to the plain one.
- ``torch._dynamo.config.recompile_limit``, torch 2.6 to 2.15.
- The rotation of transformers' attention layers is a global name of their module, ``apply_rotary_pos_emb``, up to 5.24;
  a copy of the forward's code with another value for it is the same forward with another rotation.

Where a layer cannot be compiled alone, `COMPILED` refuses ``torch_compile``; where the rotation is no global name,
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


def stand_in(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let another callable compute what a module's forward does."""
    module.forward = forward  # type: ignore[method-assign]


def standing_in(module: nn.Module) -> Any:
    """What stands in for a module's forward, ours or another library's; None if its class's forward runs."""
    return vars(module)["forward"] if "forward" in vars(module) else None


def step_aside(module: nn.Module) -> None:
    """Undo `stand_in`."""
    del module.forward


def is_plain_linear(forward: Any) -> bool:
    """Whether a bound forward is `nn.Linear`'s own."""
    return getattr(forward, "__func__", None) is nn.Linear.forward


def owner_of(forward: Any) -> Any:
    """The module that a bound forward belongs to; None if it is bound to none."""
    return getattr(forward, "__self__", None)


def compute_as(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let a module compute as a subclass of its class does; parameters, hooks and its place stay."""
    module.__class__ = kind


def with_rotation(module: nn.Module, rotation: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward of an attention layer, the same code with another rotation; None for modules without one."""
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
    """A layer's forward below every wrapper, as the one by which transformers computes it again."""
    forward = kind.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def call_layer(layer: Any, compute: Callable[..., Tensor], hidden: Tensor, options: dict[str, Any]) -> Tensor:
    """``compute(layer, hidden, **options)`` in place of a layer's forward: computed again in the backward pass if the
    forward would be."""
    inside = layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()
    if inside and not _recomputes_around_forward():
        return getattr(layer, RECOMPUTE)(partial(compute, layer, **options), hidden)
    return compute(layer, hidden, **options)


@cache
def _recomputes_around_forward() -> bool:
    """Whether a layer's ``__call__`` computes its forward again, so that what stands in for it need not."""
    return "__call__" in vars(GradientCheckpointingLayer)


def allow_recompiling(times: int) -> None:
    """Let one function be compiled so often before torch gives it up."""
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
        return "has a decoder layer that is no GradientCheckpointingLayer"
    if not _recomputes_around_forward() and not hasattr(Layer.forward, "__wrapped__"):
        return "computes layers again in another way"
    return takes(plain_forward(Layer), "hidden_states", "position_embeddings", "attention_mask", "position_ids")


COMPILED = Feature(
    name="compiling the language model's layers",
    packages=("transformers", "torch"),
    missing=_not_compiled,
    instead="",
)
FEATURES = (COMPILED,)
