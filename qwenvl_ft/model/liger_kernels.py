"""Replaces operations of the language model by Liger's fused kernels, module by module.

Liger's own patch of Qwen3-VL replaces classes of transformers for every model of the process, and cannot be imported
with the transformers that this package needs. Its single functions can. They replace the ``forward`` of a module, so
names, weights, hooks, adapters and saved files do not change. Experts keep transformers' grouped matrix products.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from qwenvl_ft.errors import RecipeError, one_line
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.upstream.layers import replace_forward, replaced_forward, with_rotation

KEY = "training.use_liger_kernel=true"
DEVICES = ("cuda", "xpu")
"""Device types for which Triton compiles Liger's kernels (AMD GPUs are of type cuda too)."""


class FusedNorm:
    """Forward of an RMSNorm in Liger's "llama" mode: the scale in float32, the rest in the input's dtype."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def __call__(self, hidden: Tensor) -> Tensor:
        module: Any = self.module
        # 0.0 is added to the weight; True lets the input's gradient overwrite the output's in place.
        return self.function.apply(hidden, module.weight, module.variance_epsilon, 0.0, "llama", True)


class FusedMLP:
    """Forward of a gated MLP: SiLU and product in one kernel, the Linear layers as they are."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def __call__(self, hidden: Tensor) -> Tensor:
        module: Any = self.module
        return module.down_proj(self.function.apply(module.gate_proj(hidden), module.up_proj(hidden)))


class FusedRotation:
    """Replacement of transformers' ``apply_rotary_pos_emb``."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.function.apply(query, key, cos, sin)


def fused_norm(module: Any, function: Any) -> Callable[..., Any] | None:
    """Return the fused forward of an RMSNorm; None for other modules."""
    is_norm = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return FusedNorm(module, function) if is_norm else None


def fused_mlp(module: Any, function: Any) -> Callable[..., Any] | None:
    """Return the fused forward of a gated MLP with SiLU; None for other modules."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gated = type(module).__name__.endswith("MLP") and all(hasattr(module, part) for part in parts)
    is_silu = gated and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    return FusedMLP(module, function) if is_silu else None


def fused_attention(module: Any, function: Any) -> Callable[..., Any] | None:
    """Return the forward of an attention layer with Liger's rotation; None for other modules."""
    return with_rotation(module, FusedRotation(function))


@dataclass(frozen=True)
class Piece:
    """One of Liger's functions, and the forward that it replaces."""

    where: str
    """Name of its module in liger_kernel.ops."""
    name: str
    """Name of the autograd function in that module."""
    forward: Callable[[Any, Any], Callable[..., Any] | None] | None
    """(module of the language model, function) -> the replacement of its forward, or None if the module does not fit.
    The field is None for the loss, which `qwenvl_ft.training.loss` builds into the language head."""

    def load(self) -> Any:
        """Import and return the function. The import may raise anything."""
        return getattr(importlib.import_module(f"liger_kernel.ops.{self.where}"), self.name)


LOSS = "fused_linear_cross_entropy"
PIECES = {
    "rms_norm": Piece("rms_norm", "LigerRMSNormFunction", fused_norm),
    "swiglu": Piece("swiglu", "LigerSiLUMulFunction", fused_mlp),
    "rope": Piece("rope", "LigerRopeFunction", fused_attention),
    LOSS: Piece(LOSS, "LigerFusedLinearCrossEntropyFunction", None),
}
"""Key of ``training.liger_kernel_config`` -> piece."""


@dataclass
class Fused:
    """Result of `use_liger`."""

    modules: dict[str, int]
    """Piece -> number of modules whose forward it replaces."""
    left: dict[str, str]
    """Piece that is not used -> the reason."""
    loss: Any = None
    """Liger's loss function, if it is used."""

    def __str__(self) -> str:
        used = [f"{name} in {count} modules" for name, count in self.modules.items()] + [LOSS] * (self.loss is not None)
        left = [f"{name}: {reason}" for name, reason in self.left.items()]
        line = f"liger-kernel {version('liger-kernel')}: {', '.join(used) or 'nothing'}"
        return f"{line}; left out: {'; '.join(left)}" if left else line


def require_liger(device: torch.device) -> None:
    """Raise RecipeError if Liger is not installed, or its kernels do not run on the device."""
    if find_spec("liger_kernel") is None:
        raise RecipeError(f"{KEY}: Liger is not installed. Run pip install liger-kernel, or remove the key.")
    if device.type not in DEVICES and not _is_interpreted():
        raise RecipeError(
            f"{KEY}: Liger's Triton kernels need a GPU, but this run is on {device.type}. Remove the key."
        )


def use_liger(model: nn.Module, device: torch.device, config: dict[str, bool] | None = None) -> Fused:
    """Use Liger's kernels in the language model of a prepared model, inside any adapters.

    Args:
        device: the device that the model will run on.
        config: piece -> False to leave it out; the default is True.

    Returns:
        The pieces in use, and those that are not: a piece is left out if it cannot be imported or fits no module.

    Raises:
        RecipeError: no piece can be used.
    """
    require_liger(device)
    fused = Fused({}, {})
    for key, piece in PIECES.items():
        if not (config or {}).get(key, True):
            fused.left[key] = "turned off in the recipe"
            continue
        try:
            function = piece.load()
        except Exception as error:
            fused.left[key] = f"{type(error).__name__}: {one_line(error, 120)}"
            continue
        if piece.forward is None:
            fused.loss = function
        elif count := _put(model, piece.forward, function):
            fused.modules[key] = count
        else:
            fused.left[key] = "it fits no module of this model"
    if not fused.modules and fused.loss is None:
        raise RecipeError(f"{KEY}: none of Liger's kernels can be used. {fused}. Remove the key.")
    return fused


def _put(model: nn.Module, forward: Callable[[Any, Any], Callable[..., Any] | None], function: Any) -> int:
    """Replace the forward of the fitting modules of the language model, and return their number."""
    count = 0
    for name, module in model.named_modules():
        of_text = "language_model." in name and part_of(name) == "llm"
        if of_text and replaced_forward(module) is None and (fused := forward(module, function)) is not None:
            replace_forward(module, fused)
            count += 1
    return count


def _is_interpreted() -> bool:
    """Return True if Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
