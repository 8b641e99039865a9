"""Loads weights in 4 or 8 bits with bitsandbytes (QLoRA, arXiv 2305.14314), and checks what can train on them.

Only Linear layers of the chosen parts are quantised, by default those of the language model: vision tower and aligner
are small, and an adapter cannot repair what a worse vision tower loses. Embeddings, the language head and the experts
of a MoE model (which are not Linear layers) are never quantised.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.anatomy import PARTS, family_of, part_of
from qwenvl_ft.recipe.methods import LORAS, over_quantized

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from qwenvl_ft.recipe.schema import QuantizationConfig, TunerConfig

logger = logging.getLogger(__name__)

INSTALL = (
    "pip install --upgrade setuptools wheel && BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel optimum"
)
"""Command that installs the packages for GPTQ and AWQ. gptqmodel is built with the environment's setuptools, and
compiles its kernels when they are first used."""
TORCH = {"gptq": "gptq_torch", "awq": "torch_awq"}
"""Method -> gptqmodel's name of the kernel in plain torch, which can train on a CPU."""
OVER_PACKED = (*LORAS, "adapter", "reft")
"""Train types that work with layers quantised by GPTQ or AWQ."""
KEPT = ("lm_head", r"model\.language_model\.layers\.\d+\.(linear_attn\.in_proj_[ab]|mlp\.shared_expert_gate)$")
"""Modules that are never quantised: the head, and gates of a few outputs, whose errors would grow along a sample."""
SKIPPED = {
    "vision": r"model\.visual\.(?!merger|deepstack_merger_list)",
    "merger": r"model\.visual\.(merger|deepstack_merger_list)",
    "llm": r"model\.language_model",
}
"""Part -> regex that transformers matches at the beginning of a module's name."""


def bnb_config(section: QuantizationConfig, config: PreTrainedConfig) -> Any:
    """Return the BitsAndBytesConfig of a recipe's section; None if it quantises nothing.

    Raises:
        RecipeError: bitsandbytes is not installed, or the checkpoint is quantised already.
    """
    if section.quantization_bit is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"quantization.quantization_bit={section.quantization_bit} needs bitsandbytes. Run pip install "
            "bitsandbytes."
        )
    written = getattr(config, "quantization_config", None)
    if written is not None:
        method = written["quant_method"] if isinstance(written, dict) else written.quant_method
        raise RecipeError(
            f"quantization.quantization_bit={section.quantization_bit}, but the model is quantised already, by "
            f"{method}. Remove the key."
        )
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if section.quantization_bit == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": section.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": section.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, section.bnb_4bit_comp_dtype),
        }
    skipped = [SKIPPED[part] for part in PARTS if part not in section.quantized_parts]
    return BitsAndBytesConfig(llm_int8_skip_modules=[*KEPT, *skipped], **options)


def require_kernels(config: PreTrainedConfig) -> None:
    """Raise unless the packages that a GPTQ or AWQ checkpoint needs are installed.

    Raises:
        CheckpointError: a package is missing.
    """
    written = getattr(config, "quantization_config", None)
    method = written.get("quant_method") if isinstance(written, dict) else getattr(written, "quant_method", None)
    lacking = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if method in ("gptq", "awq") and lacking:
        raise CheckpointError(
            f"the model is quantised by {method}, which needs {' and '.join(lacking)}. Run {INSTALL}."
        )


def use_trainable_kernels(config: PreTrainedConfig) -> None:
    """Make gptqmodel load a GPTQ or AWQ checkpoint with kernels that have a backward pass, on a machine without a GPU.

    By itself it takes the fastest kernel, which on a CPU is for inference only and fails in the first forward pass of
    training. A ``backend`` that the checkpoint's config.json names is kept.
    """
    import torch

    written = getattr(config, "quantization_config", None)
    if torch.accelerator.is_available() or not isinstance(written, dict) or written.get("quant_method") not in TORCH:
        return
    if written.get("backend") in (None, "auto"):
        written["backend"] = TORCH[written["quant_method"]]


def log_quantized(model: PreTrainedModel) -> None:
    """Log the quantised parts, and a warning for a MoE model, whose experts are not quantised."""
    names = quantized_modules(model)
    if not names:
        return
    parts = ", ".join(sorted({part_of(name) for name in names}))
    logger.info("quantised: %d Linear layers of %s", len(names), parts)
    if family_of(model.config.model_type).experts:
        logger.warning("experts, most of this model's weights, are not quantised: they are not Linear layers")


def quantized_modules(model: nn.Module) -> list[str]:
    """Return the names of the layers whose weights are quantised, by any method."""
    return [name for name, module in model.named_modules() if _is_quantized(module)]


def dequantized(model: Any) -> Any:
    """Convert a model quantised by bitsandbytes to weights of the model's dtype that give the same outputs."""
    return model.dequantize(dtype=model.config.dtype)


def require_adapter_over_quantized(model: nn.Module, tuner: TunerConfig, saved: list[str]) -> None:
    """Raise if quantised weights themselves would train, or the method does not work with them.

    Args:
        saved: names of modules that train in full.

    Raises:
        RecipeError: names the train type, its initialisation, DoRA on a CPU, or one of ``saved``.
    """
    names = quantized_modules(model)
    if not names:
        return
    parts = ", ".join(sorted({part_of(name) for name in names}))
    first: Any = model.get_submodule(names[0])
    packed = hasattr(first, "qweight")
    known = OVER_PACKED if packed else over_quantized()
    if tuner.train_type not in known:
        raise RecipeError(
            f"tuner.train_type={tuner.train_type} does not work with quantised weights, and those of {parts} are "
            f"quantised. Use one of {', '.join(known)}, or a model in 16 bits."
        )
    if tuner.changes_base:
        raise RecipeError(
            f"tuner.init_weights={tuner.init_weights} changes the base weights, and those of {parts} are quantised. "
            "Remove it, or use a model in 16 bits."
        )
    if tuner.use_dora and not packed and first.weight.device.type == "cpu":
        raise RecipeError(
            "tuner.use_dora needs norms of the base weights, which bitsandbytes repacks on a CPU. Train on a GPU, or "
            "remove tuner.use_dora or quantization.quantization_bit."
        )
    for module in saved:
        inner = [name for name in names if name == module or name.startswith(f"{module}.")]
        if inner:
            raise RecipeError(
                f"tuner.modules_to_save trains {module!r} in full, but {inner[0]} is quantised. Leave it out, or "
                f"remove {part_of(module)} from quantization.quantized_parts."
            )


def is_linear(module: nn.Module) -> bool:
    """Return True for a Linear layer, and for those of GPTQ and AWQ, which are not subclasses of it."""
    from torch import nn

    return isinstance(module, nn.Linear) or hasattr(module, "qweight")


def _is_quantized(module: nn.Module) -> bool:
    from torch import Tensor

    weight: Any = getattr(module, "weight", None)
    integer = isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex())
    return integer or hasattr(module, "qweight")
