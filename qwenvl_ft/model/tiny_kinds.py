"""Describes the tiny checkpoints (tiny.py): their sizes, and how the model types differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_words": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32768,
    "vision_hidden_size": 64,
    "vision_intermediate_size": 192,
    "vision_depth": 4,
    "vision_num_heads": 4,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": (0, 1, 2),
    "window_size": 112,
    "fullatt_block_indexes": (1, 3),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "initializer_range": 0.02,
    "min_pixels": 1024,
    "max_pixels": 65536,
    "max_video_pixels": 524288,
}
"""Sizes that ``make_tiny`` accepts, with their defaults. ``vocab_words`` counts byte-level words, including the 256
bytes; the special tokens follow. ``deepstack_visual_indexes`` are the ViT blocks that feed a deepstack merger.
``window_size`` is the side of Qwen2.5-VL's attention windows in pixels, as in the released models;
``fullatt_block_indexes`` are the ViT blocks without windows. Pixels are areas: of one image, and of a whole video
(frames x height x width). A family ignores the sizes of parts that it does not have. ``moe_intermediate_size`` is
neither ``hidden_size`` nor half of it: transformers 5 would read square weights of experts transposed."""

_TEXT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
)
_HEADS = ("head_dim",)
_DENSE = ("intermediate_size",)
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_DELTA_NET = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")

_TOWER = {"depth": "vision_depth", "num_heads": "vision_num_heads", "initializer_range": "initializer_range"}
_WIDE_TOWER = _TOWER | {
    "hidden_size": "vision_hidden_size",
    "intermediate_size": "vision_intermediate_size",
    "out_hidden_size": "hidden_size",
}
_LEARNED_POSITIONS = {"num_position_embeddings": "num_position_embeddings"}
_DEEPSTACK = {"deepstack_visual_indexes": "deepstack_visual_indexes"}
_WINDOWS = {"window_size": "window_size", "fullatt_block_indexes": "fullatt_block_indexes"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What distinguishes the checkpoints of one model type."""

    config: str
    """Class of transformers."""
    text_sizes: tuple[str, ...]
    """Keys of ``SIZES`` in the text model's config."""
    has_control_ids: bool = False
    """The text model's config has default ids of the first and last token, which are not those of a tiny tokenizer."""
    vision_sizes: Mapping[str, str] = field(default_factory=lambda: _WIDE_TOWER | _LEARNED_POSITIONS | _DEEPSTACK)
    """Key of the vision tower's config -> key of ``SIZES``."""
    tokenizer: str = "qwen2.Qwen2Tokenizer"
    """Class in a module ``transformers.models.MODULE``, whose ``tokenization_MODULE`` has ``PRETOKENIZE_REGEX``."""
    processor: str = "Qwen3VLProcessor"
    """Class of transformers; likewise that for videos. Images have the same in all types."""
    video_processor: str = "Qwen3VLVideoProcessor"
    template: str = "chat_template.jinja"
    patch_size: int = 16
    """Side of a patch, in pixels."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of red, green and blue, on the scale 0 to 1; likewise the deviation."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    size_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sizes for which this type has another default."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 5_000_000, "mrope_interleaved": True})
    """Further ``rope_parameters``."""
    released_sections: tuple[int, int, int] = (24, 20, 20)
    """Frequencies for time, height and width in the released models."""

    def rope_parameters(self, head_dim: int) -> dict[str, Any]:
        """Return the config's ``rope_parameters``, with the released shares of a head's frequencies."""
        half = int(head_dim * self.rope.get("partial_rotary_factor", 1)) // 2
        _, height, width = (half * part // sum(self.released_sections) for part in self.released_sections)
        return {"rope_type": "default", "mrope_section": [half - height - width, height, width], **self.rope}


_QWEN3_5: dict[str, Any] = {
    "tokenizer": "qwen3_5.Qwen3_5Tokenizer",
    "template": "chat_template_qwen3_5.jinja",
    "size_defaults": {"head_dim": 32},
    "rope": {"rope_theta": 10_000_000, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    "vision_sizes": _WIDE_TOWER | _LEARNED_POSITIONS,
    "released_sections": (11, 11, 10),
}
_QWEN2: dict[str, Any] = {
    "text_sizes": _TEXT + _DENSE,
    "has_control_ids": True,
    "video_processor": "Qwen2VLVideoProcessor",
    "template": "chat_template_qwen2_vl.jinja",
    "patch_size": 14,
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
    "rope": {"rope_theta": 1_000_000},
    "released_sections": (16, 24, 24),
}
KINDS = {
    "qwen3_vl": Kind(config="Qwen3VLConfig", text_sizes=_TEXT + _HEADS + _DENSE),
    "qwen3_vl_moe": Kind(config="Qwen3VLMoeConfig", text_sizes=_TEXT + _HEADS + _DENSE + _EXPERTS),
    "qwen3_5": Kind(config="Qwen3_5Config", text_sizes=_TEXT + _HEADS + _DENSE + _DELTA_NET, **_QWEN3_5),
    "qwen3_5_moe": Kind(
        config="Qwen3_5MoeConfig",
        text_sizes=_TEXT + _HEADS + _EXPERTS + _DELTA_NET + ("shared_expert_intermediate_size",),
        **_QWEN3_5,
    ),
    "qwen2_5_vl": Kind(
        config="Qwen2_5_VLConfig", processor="Qwen2_5_VLProcessor", vision_sizes=_WIDE_TOWER | _WINDOWS, **_QWEN2
    ),
    "qwen2_vl": Kind(
        config="Qwen2VLConfig",
        processor="Qwen2VLProcessor",
        vision_sizes=_TOWER | {"embed_dim": "vision_hidden_size", "hidden_size": "hidden_size"},
        **_QWEN2,
    ),
}
"""``model_type`` -> how to make a tiny checkpoint of it."""
TINY_FAMILIES = tuple(name for name in KINDS if not name.endswith("_moe"))
"""Names that `make_tiny` takes as ``family``; some have a type with experts too."""
