"""Loading weights in 4 or 8 bits by bitsandbytes, to train an adapter over them (QLoRA, arXiv 2305.14314).

Only Linear layers of the chosen parts are quantised, by default those of the language model: vision tower and aligner
are small, and an image that is seen badly is not put right by an adapter. Never quantised are embeddings, the language
head, and the experts of a MoE model, which are no Linear layers.
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
    from transformers import PreTrainedConfig

    from qwenvl_ft.recipe.schema import QuantizationConfig, TunerConfig

logger = logging.getLogger(__name__)

INSTALL = "BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel optimum"
"""How GPTQ and AWQ come here; its own kernels are compiled when they are first used."""
OVER_PACKED = (*LORAS, "adapter", "reft")
"""Train types that work over GPTQ's and AWQ's layers."""
KEPT = ("lm_head",)
"""Modules that stay as they are in every part."""
SKIPPED = {
    "vision": r"model\.visual\.(?!merger|deepstack_merger_list)",
    "merger": r"model\.visual\.(merger|deepstack_merger_list)",
    "llm": r"model\.language_model",
}
"""Part -> regex that transformers matches with the beginning of a module's name."""


def bnb_config(told: QuantizationConfig, config: PreTrainedConfig) -> Any:
    """The ``quantization_config`` that transformers loads by; None where the recipe asks for none.

    Raises:
        RecipeError: bitsandbytes is not installed, or the checkpoint is quantised already.
    """
    if told.quantization_bit is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"quantization.quantization_bit={told.quantization_bit} needs bitsandbytes. Install it by pip install "
            "bitsandbytes."
        )
    own = getattr(config, "quantization_config", None)
    if own is not None:
        method = own["quant_method"] if isinstance(own, dict) else own.quant_method
        raise RecipeError(
            f"quantization.quantization_bit={told.quantization_bit}, but the model is quantised already, by {method}. "
            "Remove the key."
        )
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if told.quantization_bit == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": told.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": told.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, told.bnb_4bit_comp_dtype),
        }
    skipped = [SKIPPED[part] for part in PARTS if part not in told.quantized_parts]
    return BitsAndBytesConfig(llm_int8_skip_modules=[*KEPT, *skipped], **options)


def require_kernels(config: PreTrainedConfig) -> None:
    """Refuse a GPTQ or AWQ checkpoint where nothing here could compute with it.

    Raises:
        CheckpointError: a package is missing.
    """
    own = getattr(config, "quantization_config", None)
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    lacking = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if method in ("gptq", "awq") and lacking:
        raise CheckpointError(
            f"the model is quantised by {method}, which needs {' and '.join(lacking)}. Install by {INSTALL}."
        )


def tell_quantized(model: Any) -> None:
    """Say what was quantised, and what of a MoE model was not."""
    names = quantized_modules(model)
    if not names:
        return
    parts = ", ".join(sorted({part_of(name) for name in names}))
    logger.info("quantised: %d Linear layers of %s", len(names), parts)
    if family_of(model.config.model_type).experts:
        logger.warning("experts are no Linear layers and are not quantised: they are most of this model's weights")


def quantized_modules(model: nn.Module) -> list[str]:
    """Names of the layers whose weights are quantised, by whatever method."""
    return [name for name, module in model.named_modules() if _is_quantized(module)]


def dequantized(model: Any) -> Any:
    """A model that bitsandbytes quantised, with weights of the model's dtype that compute the same."""
    return model.dequantize(dtype=model.config.dtype)


def require_adapter_over_quantized(model: nn.Module, tuner: TunerConfig, saved: list[str]) -> None:
    """Refuse to train quantised weights themselves, and methods that do not work over them.

    Args:
        saved: names of modules that train in full.

    Raises:
        RecipeError: the train type, its start, DoRA on a CPU, or one of ``saved``.
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
            f"tuner.train_type={tuner.train_type} does not work over weights in few bits, and those of {parts} are "
            f"quantised. Use one of {', '.join(known)}, or a model in 16 bits."
        )
    if tuner.changes_base:
        raise RecipeError(
            f"tuner.init_weights={tuner.init_weights} changes the base weights, and those of {parts} are quantised. "
            "Remove it, or take a model in 16 bits."
        )
    if tuner.use_dora and not packed and first.weight.device.type == "cpu":
        raise RecipeError(
            "tuner.use_dora takes norms of the base weights, which bitsandbytes packs anew on a CPU. Train on a GPU, "
            "or remove tuner.use_dora or quantization.quantization_bit."
        )
    for module in saved:
        inner = [name for name in names if name == module or name.startswith(f"{module}.")]
        if inner:
            raise RecipeError(
                f"tuner.modules_to_save trains {module!r} in full, but {inner[0]} is quantised. Leave it out, or take "
                f"{part_of(module)} out of quantization.quantized_parts."
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear layer, or one of GPTQ's and AWQ's, which are no subclass of it."""
    from torch import nn

    return isinstance(module, nn.Linear) or hasattr(module, "qweight")


def _is_quantized(module: nn.Module) -> bool:
    from torch import Tensor

    weight: Any = getattr(module, "weight", None)
    integer = isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex())
    return integer or hasattr(module, "qweight")
