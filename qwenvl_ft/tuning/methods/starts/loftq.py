"""LoftQ (arXiv 2310.08659): initialises LoRA so that its update compensates for the error of 4-bit quantisation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.peft import lora_layers


@torch.no_grad()
def initialize_loftq(wrapped: Any) -> Any:
    """Set A and B of each 4-bit layer so that ``s B A`` approximates ``W - Q``, and return the PeftModel.

    peft's own LoftQ runs on CUDA only and ignores the scale s.

    Raises:
        RecipeError: no adapted layer is in 4 bits, or the checkpoint on disk is quantised already.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    read = _original_weights(wrapped)
    found = 0
    module: Any
    for name, module in lora_layers(wrapped):
        if not isinstance(module.get_base_layer(), Linear4bit):
            continue
        quantised: Any = module.get_base_layer().weight
        whole = read(f"{name.removeprefix('base_model.model.')}.weight").float().to(quantised.device)
        if whole.shape != (module.out_features, module.in_features):
            raise RecipeError(
                "tuner.init_weights=loftq needs the original weights, but the checkpoint on disk is quantised already. "
                "Set model.model to the model in 16 bits, with quantization.quantization_bit=4."
            )
        lost = whole - dequantize_4bit(quantised.data, quantised.quant_state).float()
        for adapter, rank in module.r.items():
            left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
            roots = (sizes[:rank] / module.scaling[adapter]).sqrt()
            factors: Any = module.lora_A[adapter], module.lora_B[adapter]
            factors[0].weight.copy_(roots[:, None] * right[:rank])
            factors[1].weight.copy_(left[:, :rank] * roots)
        found += 1
    if not found:
        raise RecipeError(
            "tuner.init_weights=loftq compensates for quantisation, but no adapted layer is in 4 bits. Set "
            "quantization.quantization_bit=4, or use another init_weights."
        )
    return wrapped


def _original_weights(wrapped: Any) -> Callable[[str], Tensor]:
    """Return a function that reads a weight of the base model from disk, by name."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    source = wrapped.get_base_model().name_or_path
    try:
        index = cached_file(source, "model.safetensors.index.json")
    except OSError:  # one file holds all weights
        index = None
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else None

    def read(name: str) -> Tensor:
        file = cached_file(source, shards[name] if shards else "model.safetensors")
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)

    return read
