"""The sections ``model``, ``quantization`` and ``deepspeed``: which weights, in which precision, and where they are."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl_ft.recipe.limits import Positive


@dataclass(kw_only=True)
class ModelConfig:
    """The model, and how it is loaded."""

    model: str = ""
    """Directory or Hub id of a Qwen-VL model; required for training."""
    model_type: str | None = None
    """Expected model_type of the model's config.json (qwen3_vl, qwen3_vl_moe, ...); any other is an error."""
    model_revision: str = "main"
    """Branch, tag or commit on the Hub."""
    torch_dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Precision of frozen weights and of computation. Trainable weights are kept in float32."""
    attn_impl: Literal[
        "auto",
        "flash_attn",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "packed_sdpa",
        "sdpa",
        "eager",
    ] = "auto"
    """Attention implementation. auto takes flash-attention where it runs, else torch's SDPA on each sample
    (packed_sdpa)."""
    device_map: str | dict[str, Any] | None = None
    """auto, a device, or a mapping from module names to devices; model.layers.0-15 stands for sixteen layers. One
    process only."""
    max_memory: dict[str, Any] | None = None
    """With device_map, the memory limit of each device: {"0": "40GB", "cpu": "100GB"}."""
    max_model_len: Positive | None = None
    """Longest sequence to prepare for, in tokens; above the model's own limit only with rope_scaling."""
    rope_scaling: str | dict[str, Any] | None = None
    """linear, dynamic, yarn, or a mapping with type and factor. The M-RoPE sections are kept."""
    patch_embed: Literal["linear", "conv3d"] = "linear"
    """Compute the patch embedding as a matrix product (same weights, faster) or as the upstream convolution."""


@dataclass(kw_only=True)
class QuantizationConfig:
    """Base weights in 4 or 8 bits (bitsandbytes), to train an adapter on top of them."""

    quantization_bit: Literal[4, 8] | None = None
    """Bits per weight; null turns quantisation off."""
    quantized_parts: list[Literal["vision", "merger", "llm"]] = field(default_factory=lambda: ["llm"])
    """Parts whose Linear layers are quantised. Embeddings, language head and experts never are."""
    bnb_4bit_comp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision in which 4-bit weights are multiplied."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights: normal float (nf4) or floating point (fp4)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of 4-bit weights as well."""


@dataclass(kw_only=True)
class DeepspeedConfig:
    """ZeRO sharding by DeepSpeed."""

    enabled: bool = False
    """Train with DeepSpeed."""
    config: str | dict[str, Any] = "zero2"
    """zero2, zero2_offload, zero3, zero3_offload, a JSON file, or the configuration itself."""
    zero_hpz_partition_size: Positive | None = None
    """ZeRO++: number of GPUs, such as those of one node, that share a second copy of the sharded weights. ZeRO-3
    only."""
