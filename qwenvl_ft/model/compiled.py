"""Compiles the decoder layers of the language model with torch.compile; all layers share the compiled code.

Compiling the whole model fails, and would recompile for each mixture of images. The layers are all alike, and most of
their kernels are small: norms, rotations, SiLU, sums. Attention is excluded: it is a kernel of its own and depends on
where samples begin. Activation checkpointing stays outside of the compiled region too: torch.compile silently gives up
a region with a checkpoint as soon as something in it cannot be compiled. The number of tokens is a dynamic dimension,
because rows are never quite full.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.adapters.base import OwnLayer
from qwenvl_ft.model.anatomy import family_of, layer_kinds
from qwenvl_ft.upstream.attention import attention_of, without_compiling
from qwenvl_ft.upstream.layers import (
    COMPILED,
    allow_recompiling,
    call_layer,
    plain_forward,
    replace_forward,
    replaced_forward,
    restore_forward,
)

DELTA_NET = "linear_attention"
"""Name in ``layer_types`` of a text model's config for layers with a gated delta net."""
RECOMPILES = 8
"""Number of times that a layer may be recompiled for rows of another kind."""


class CompiledForward:
    """Replaces a layer's ``forward`` by its compiled code, with activation checkpointing if the layer uses it.

    Names, weights, hooks and saved files do not change.
    """

    def __init__(self, layer: nn.Module, compiled: Callable[..., Tensor]) -> None:
        self.layer, self.compiled = layer, compiled

    def __call__(self, hidden: Tensor, **options: Any) -> Tensor:
        return call_layer(self.layer, self.compiled, hidden, options)


def require_compilable(config: Any) -> None:
    """Check that the layers of a model can be compiled, before its weights are loaded.

    Args:
        config: the model's.

    Raises:
        RecipeError: it has gated delta nets: torch 2.15 computes strides for their backward pass that are not those of
            its tensors.
    """
    if DELTA_NET in layer_kinds(config):
        raise RecipeError(
            f"training.torch_compile=true does not work with the gated delta nets of {config.model_type}. "
            "Set training.torch_compile=false."
        )


def compile_layers(model: nn.Module, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the language model's layers in place, inside any wrappers (adapters, sharding).

    Args:
        model: must have its key-value cache turned off, as for training.
        backend: see torch.compile.
        mode: see torch.compile.

    Returns:
        The number of layers. Compilation happens in the first passes.

    Raises:
        RecipeError: the installed transformers or torch has layers that cannot be compiled one by one, or the model
            cannot, see `require_compilable`.
    """
    COMPILED.require("training.torch_compile=true")
    inner = _inner(model)
    require_compilable(inner.config)
    name = attention_of(inner.config.get_text_config())
    if name in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, without_compiling(ALL_ATTENTION_FUNCTIONS[name]))
    layers = list(_layers(inner))
    allow_recompiling(RECOMPILES + len(layers))  # each layer may have its own LoRA rank
    compiled: dict[Callable[..., Any], Callable[..., Tensor]] = {}
    for layer in layers:
        if replaced_forward(layer) is None:
            plain = plain_forward(type(layer))
            if plain not in compiled:
                compiled[plain] = torch.compile(plain, backend=backend, mode=mode, dynamic=True)
            replace_forward(layer, CompiledForward(layer, compiled[plain]))
    return len(layers)


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`, for generation, which would recompile at each step."""
    for layer in _layers(_inner(model)):
        if isinstance(replaced_forward(layer), CompiledForward):
            restore_forward(layer)


@contextmanager
def layers_not_compiled(model: nn.Module) -> Iterator[None]:
    """Run compiled layers as they are written, for generation within training; the compiled code is kept."""
    kept = [(layer, replaced_forward(layer)) for layer in _layers(_inner(model))]
    restore_layers(model)
    try:
        yield
    finally:
        for layer, forward in kept:
            if isinstance(forward, CompiledForward):
                replace_forward(layer, forward)


def _inner(model: nn.Module) -> Any:
    """Return the PreTrainedModel inside any wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _layers(inner: Any) -> Iterator[GradientCheckpointingLayer]:
    """Return the decoder layers, without the wrappers of this package's adapters."""
    layers = inner.get_submodule(family_of(inner.config.model_type).text_layers)
    found = (layer.base_layer if isinstance(layer, OwnLayer) else layer for layer in layers)
    return (layer for layer in found if isinstance(layer, GradientCheckpointingLayer))
