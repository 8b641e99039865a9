"""Liger's fused kernels in place of what transformers computes in several, module by module of one model.

Liger's own patch of Qwen3-VL replaces classes of transformers, for every model of the process, and does not import
beside the transformers that is needed here. Its single functions do. They stand in for the ``forward`` of a module,
so that names, weights, hooks, adapters and what is saved stay as they are. Experts keep transformers' grouped products.
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
from qwenvl_ft.upstream.layers import stand_in, standing_in, with_rotation

KEY = "training.use_liger_kernel=true"
DEVICES = ("cuda", "xpu")
"""Kinds of device that Triton compiles Liger's kernels for (AMD's are called cuda too)."""


class FusedNorm:
    """Stands in for the forward of an RMSNorm, as Llama's: its scale in float32, the rest in the input's precision."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def __call__(self, hidden: Tensor) -> Tensor:
        module: Any = self.module
        # 0.0 is added to the weight; True lets the gradient of the input overwrite that of the output.
        return self.function.apply(hidden, module.weight, module.variance_epsilon, 0.0, "llama", True)


class FusedMLP:
    """Stands in for the forward of a gated MLP: SiLU and product in one kernel, the linear layers as they are."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        self.module, self.function = module, function

    def __call__(self, hidden: Tensor) -> Tensor:
        module: Any = self.module
        return module.down_proj(self.function.apply(module.gate_proj(hidden), module.up_proj(hidden)))


class FusedRotation:
    """Takes the place of transformers' ``apply_rotary_pos_emb``."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.function.apply(query, key, cos, sin)


def fused_norm(module: Any, function: Any) -> Callable[..., Any] | None:
    """The forward of an RMSNorm; None for other modules."""
    is_norm = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return FusedNorm(module, function) if is_norm else None


def fused_mlp(module: Any, function: Any) -> Callable[..., Any] | None:
    """The forward of a gated MLP with SiLU; None for other modules."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gated = type(module).__name__.endswith("MLP") and all(hasattr(module, part) for part in parts)
    is_silu = gated and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    return FusedMLP(module, function) if is_silu else None


def fused_attention(module: Any, function: Any) -> Callable[..., Any] | None:
    """The forward of an attention layer with Liger's rotation; None for modules without one."""
    return with_rotation(module, FusedRotation(function))


@dataclass(frozen=True)
class Piece:
    """One of Liger's functions, and what it takes the place of."""

    where: str
    """Its module in liger_kernel.ops."""
    name: str
    """The autograd function there."""
    forward: Callable[[Any, Any], Callable[..., Any] | None] | None
    """A module of the language model, and the function -> what stands in for its forward, if anything. None for the
    loss, which `qwenvl_ft.training.loss` puts into the head."""

    def load(self) -> Any:
        """The function. Raises whatever its import does."""
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
    """What Liger computes in a model, and what it does not."""

    modules: dict[str, int]
    """Piece -> modules of the model that it stands in."""
    left: dict[str, str]
    """Piece -> why it is not used."""
    loss: Any = None
    """The function of the loss, if it is used."""

    def __str__(self) -> str:
        here = [f"{name} in {count} modules" for name, count in self.modules.items()] + [LOSS] * (self.loss is not None)
        left = [f"{name}: {why}" for name, why in self.left.items()]
        told = f"liger-kernel {version('liger-kernel')}: {', '.join(here) or 'nothing'}"
        return f"{told}; left out: {'; '.join(left)}" if left else told


def require_liger(device: torch.device) -> None:
    """Raises RecipeError where Liger is not installed, or there is nothing that its kernels run on."""
    if find_spec("liger_kernel") is None:
        raise RecipeError(f"{KEY}: it is not installed. Do so by pip install liger-kernel, or remove the key.")
    if device.type not in DEVICES and not _is_interpreted():
        raise RecipeError(
            f"{KEY}: its kernels are Triton's, which run on a GPU, and this run is on {device.type}. Remove the key."
        )


def use_liger(model: nn.Module, device: torch.device, config: dict[str, bool] | None = None) -> Fused:
    """Let Liger compute what it can in the language model of a prepared model; adapters are looked through.

    Args:
        device: that it will run on.
        config: piece -> whether it is wanted; those that are not named are.

    Returns:
        What is used and what is not. A piece that cannot be imported is left out, and so is one that the model has no
        place for.

    Raises:
        RecipeError: Liger cannot be used at all.
    """
    require_liger(device)
    fused = Fused({}, {})
    for key, piece in PIECES.items():
        if not (config or {}).get(key, True):
            fused.left[key] = "the recipe says so"
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
            fused.left[key] = "no module of this model is of its kind"
    if not fused.modules and fused.loss is None:
        raise RecipeError(f"{KEY}: none of its kernels can be used. {fused}. Remove the key.")
    return fused


def _put(model: nn.Module, forward: Callable[[Any, Any], Callable[..., Any] | None], function: Any) -> int:
    """Give the modules of the language model that are of a kind another forward; how many."""
    count = 0
    for name, module in model.named_modules():
        of_text = "language_model." in name and part_of(name) == "llm"
        if of_text and standing_in(module) is None and (own := forward(module, function)) is not None:
            stand_in(module, own)
            count += 1
    return count


def _is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, line by line (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
