"""Models of the benchmarks: the released dimensions and two small ones, with random weights.

No files are needed: tokenizer and processor are those of the tiny checkpoint; the vocabulary has the released size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenvl_ft.errors import unknown_name
from qwenvl_ft.model.choose_attention import resolve_attn_impl
from qwenvl_ft.model.load import use_packed_rows
from qwenvl_ft.model.packed_attention import TEXT_NAME
from qwenvl_ft.model.tiny import make_processor, make_tokenizer
from qwenvl_ft.model.tiny_kinds import SIZES as TINY
from qwenvl_ft.recipe.schema import ModelConfig

VOCABULARY = 151_936
"""Vocabulary size of every released Qwen3-VL."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Dimensions of a Qwen3-VL."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the MLP, or of one expert in a MoE."""
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    deepstack: tuple[int, ...]
    """Vision blocks that feed a deepstack merger."""
    tied: bool = True
    """True if embeddings and language head share their weight."""
    experts: int = 0
    experts_per_token: int = 0
    vocabulary: int = VOCABULARY


_SMALL_VIT = {"vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096}
_LARGE_VIT = {"vision_hidden": 1152, "vision_layers": 27, "vision_heads": 16, "vision_mlp": 4304}
_SMALL: dict[str, Any] = _SMALL_VIT | {"deepstack": (5, 11, 17), "kv_heads": 8, "head_dim": 128}
_LARGE: dict[str, Any] = _LARGE_VIT | {"deepstack": (8, 16, 24), "head_dim": 128, "tied": False}


def _little(width: int, layers: int, head_dim: int, vocabulary: int) -> Size:
    return Size(
        hidden=width,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        mlp=3 * width,
        vision_hidden=width,
        vision_layers=layers,
        vision_heads=4,
        vision_mlp=3 * width,
        deepstack=(0, 1, 2),
        vocabulary=vocabulary,
    )


SIZES = {
    "tiny": _little(64, 4, 16, 1024),
    "mini": _little(256, 6, 64, VOCABULARY),
    "2b": Size(hidden=2048, layers=28, heads=16, mlp=6144, **_SMALL),
    "4b": Size(hidden=2560, layers=36, heads=32, mlp=9728, **_SMALL),
    "8b": Size(hidden=4096, layers=36, heads=32, kv_heads=8, mlp=12288, **_LARGE),
    "30b-a3b": Size(hidden=2048, layers=48, heads=32, kv_heads=4, mlp=768, experts=128, experts_per_token=8, **_LARGE),
}
"""Name -> dimensions; from 2b on as in the released config.json files."""


def size_of(name: str) -> Size:
    """Return the size of that name; raises RecipeError if there is none."""
    if name not in SIZES:
        raise unknown_name("size", name, SIZES)
    return SIZES[name]


def make_config(name: str) -> Any:
    """Return the config of a size, with the token ids of the tiny checkpoint's tokenizer."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    size, ids = size_of(name), _tokenizer().convert_tokens_to_ids
    half = size.head_dim // 2
    side = half * 20 // 64  # released: 24, 20 and 20 of 64 frequencies for time, height and width
    text: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": size.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000,
            "mrope_section": [half - 2 * side, side, side],
            "mrope_interleaved": True,
        },
    }
    if size.experts:
        text |= {
            "num_experts": size.experts,
            "num_experts_per_tok": size.experts_per_token,
            "moe_intermediate_size": size.mlp,
        }
    vision = {
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": list(size.deepstack),
    }
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    borders = {"start": "<|vision_start|>", "end": "<|vision_end|>"}
    tokens = {f"{kind}_token_id": ids(token) for kind, token in special.items()}
    tokens |= {f"vision_{kind}_token_id": ids(token) for kind, token in borders.items()}
    cls: Any = Qwen3VLMoeConfig if size.experts else Qwen3VLConfig
    return cls(text_config=text, vision_config=vision, tie_word_embeddings=size.tied, **tokens)


def write_size(name: str, folder: Path) -> None:
    """Write config and processor of a size, without weights, so that a recipe can use the folder as its model."""
    make_config(name).save_pretrained(folder)
    bench_processor().save_pretrained(folder)


def bench_processor(*, min_pixels: int = 1024, max_pixels: int = 1 << 24) -> Any:
    """Return a processor: the tiny checkpoint's tokenizer and Qwen3-VL's image processor, with areas in pixels."""
    areas = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return make_processor(_tokenizer(), TINY | areas)


def random_model(config: Any, section: ModelConfig, device: torch.device) -> Any:
    """Create a model with random weights on its device, otherwise as `load_model` returns one.

    Args:
        section: a recipe's ``model`` section.
    """
    from transformers import AutoModelForImageTextToText

    attention = resolve_attn_impl(section.attn_impl, section.torch_dtype)
    auto: Any = AutoModelForImageTextToText
    with torch.device(device):
        model = auto.from_config(
            config,
            dtype=getattr(torch, section.torch_dtype),
            attn_implementation="sdpa" if attention == TEXT_NAME else attention,
        )
    use_packed_rows(model, attention=attention, patch_embed=section.patch_embed)
    return model


def _tokenizer() -> Any:
    return make_tokenizer(TINY["vocab_words"])
