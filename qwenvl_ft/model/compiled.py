"""The language model's layers compiled by torch, one region for all of them.

Compiling the whole model fails on it, and would compile anew for each mixture of images. The layers are all alike, and
most of what they launch is small: norms, rotations, SiLU, sums. Attention is left out, which is a kernel of its own and
depends on where samples begin. So is what computes a layer again: a region that holds a checkpoint is given up by
torch.compile without a word as soon as something in it cannot be compiled. Rows are never quite full, so that their
number of tokens is a variable of the compiled code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl_ft.model.adapters.base import OwnLayer
from qwenvl_ft.model.anatomy import family_of
from qwenvl_ft.upstream.attention import attention_of, without_compiling
from qwenvl_ft.upstream.layers import (
    COMPILED,
    allow_recompiling,
    call_layer,
    plain_forward,
    stand_in,
    standing_in,
    step_aside,
)

RECOMPILES = 8
"""Times that a layer may be compiled anew for rows of another kind."""


class CompiledForward:
    """Stands in for a layer's ``forward``: its own code compiled, computed again in the backward pass if it was.

    Names, weights, hooks and what is saved stay as they are.
    """

    def __init__(self, layer: nn.Module, compiled: Callable[..., Tensor]) -> None:
        self.layer, self.compiled = layer, compiled

    def __call__(self, hidden: Tensor, **options: Any) -> Tensor:
        return call_layer(self.layer, self.compiled, hidden, options)


def compile_layers(model: nn.Module, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the language model's layers in place; wrappers (adapters, sharding) are looked through.

    Args:
        model: with a key-value cache turned off, as for training.
        backend: as torch.compile's.
        mode: as torch.compile's.

    Returns:
        The number of layers. They are compiled by the first passes.

    Raises:
        RecipeError: the installed transformers or torch has layers of another shape.
    """
    COMPILED.require("training.torch_compile=true")
    inner = _inner(model)
    name = attention_of(inner.config.get_text_config())
    if name in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, without_compiling(ALL_ATTENTION_FUNCTIONS[name]))
    layers = list(_layers(inner))
    allow_recompiling(RECOMPILES + len(layers))  # each may have a rank of its own
    made: dict[Callable[..., Any], Callable[..., Tensor]] = {}
    for layer in layers:
        if standing_in(layer) is None:
            plain = plain_forward(type(layer))
            if plain not in made:
                made[plain] = torch.compile(plain, backend=backend, mode=mode, dynamic=True)
            stand_in(layer, CompiledForward(layer, made[plain]))
    return len(layers)


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`, for generation, where each step would be compiled anew."""
    for layer in _layers(_inner(model)):
        if isinstance(standing_in(layer), CompiledForward):
            step_aside(layer)


def _inner(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _layers(inner: Any) -> Any:
    layers = inner.get_submodule(family_of(inner.config.model_type).text_layers)
    found = (layer.base_layer if isinstance(layer, OwnLayer) else layer for layer in layers)
    return (layer for layer in found if isinstance(layer, GradientCheckpointingLayer))
