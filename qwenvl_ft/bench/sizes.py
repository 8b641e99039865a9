"""Models of the benchmarks: the released dimensions and three small ones, with random weights.

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
from qwenvl_ft.model.tiny_kinds import KINDS
from qwenvl_ft.model.tiny_kinds import SIZES as TINY
from qwenvl_ft.recipe.schema import ModelConfig

VOCABULARY = 151_936
"""Vocabulary size of every released Qwen3-VL."""
VOCABULARY_QWEN3_5 = 248_320


@dataclass(frozen=True, kw_only=True)
class Size:
    """Dimensions of a Qwen3-VL, or of a Qwen3.5, which has gated delta nets in three of four layers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the MLP, or of one expert in a MoE. The shared expert of a Qwen3.5 is as wide as another."""
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    deepstack: tuple[int, ...] = ()
    """Vision blocks that feed a deepstack merger."""
    tied: bool = True
    """True if embeddings and language head share their weight."""
    experts: int = 0
    experts_per_token: int = 0
    vocabulary: int = VOCABULARY
    delta_heads: tuple[int, int] | None = None
    """Heads of queries and keys, and of values, in a gated delta net; None for a Qwen3-VL."""
    delta_head_dim: int = 128

    @property
    def kind(self) -> str:
        """Key of `qwenvl_ft.model.tiny.KINDS`."""
        family = "qwen3_5" if self.delta_heads else "qwen3_vl"
        return f"{family}_moe" if self.experts else family


_VIT_S = {"vision_hidden": 768, "vision_layers": 12, "vision_heads": 12, "vision_mlp": 3072}
_VIT_M = {"vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096}
_VIT_L = {"vision_hidden": 1152, "vision_layers": 27, "vision_heads": 16, "vision_mlp": 4304}
_SMALL: dict[str, Any] = _VIT_M | {"deepstack": (5, 11, 17), "kv_heads": 8, "head_dim": 128}
_LARGE: dict[str, Any] = _VIT_L | {"deepstack": (8, 16, 24), "head_dim": 128, "tied": False}
_EXPERTS = {"experts": 256, "experts_per_token": 8}


def _little(width: int, layers: int, head_dim: int, vocabulary: int, **more: Any) -> Size:
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
        vocabulary=vocabulary,
        **more,
    )


def _qwen3_5(
    hidden: int, layers: int, heads: tuple[int, int], values: int, mlp: int, tower: dict[str, Any], **more: Any
) -> Size:
    """Return the dimensions of a released Qwen3.5.

    Args:
        heads: of queries, and of keys and values, in the layers with full attention.
        values: heads of values in a delta net.
    """
    return Size(
        hidden=hidden,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=256,
        mlp=mlp,
        vocabulary=VOCABULARY_QWEN3_5,
        delta_heads=(16, values),
        **tower,
        **more,
    )


_APART: dict[str, Any] = _VIT_L | {"tied": False}
SIZES = {
    "tiny": _little(64, 4, 16, 1024, deepstack=(0, 1, 2)),
    "mini": _little(256, 6, 64, VOCABULARY, deepstack=(0, 1, 2)),
    "2b": Size(hidden=2048, layers=28, heads=16, mlp=6144, **_SMALL),
    "4b": Size(hidden=2560, layers=36, heads=32, mlp=9728, **_SMALL),
    "8b": Size(hidden=4096, layers=36, heads=32, kv_heads=8, mlp=12288, **_LARGE),
    "30b-a3b": Size(hidden=2048, layers=48, heads=32, kv_heads=4, mlp=768, experts=128, experts_per_token=8, **_LARGE),
    "qwen3.5-tiny": _little(64, 4, 32, 1024, delta_heads=(2, 4), delta_head_dim=16),
    "qwen3.5-0.8b": _qwen3_5(1024, 24, (8, 2), 16, 3584, _VIT_S),
    "qwen3.5-2b": _qwen3_5(2048, 24, (8, 2), 16, 6144, _VIT_M),
    "qwen3.5-4b": _qwen3_5(2560, 32, (16, 4), 32, 9216, _VIT_M),
    "qwen3.5-9b": _qwen3_5(4096, 32, (16, 4), 32, 12288, _APART),
    "qwen3.5-27b": _qwen3_5(5120, 64, (24, 4), 48, 17408, _APART),
    "qwen3.5-35b-a3b": _qwen3_5(2048, 40, (16, 2), 32, 512, _APART, **_EXPERTS),
    "qwen3.5-122b-a10b": _qwen3_5(3072, 48, (32, 2), 64, 1024, _APART, **_EXPERTS),
    "qwen3.5-397b-a17b": _qwen3_5(4096, 60, (32, 2), 64, 1024, _APART, experts=512, experts_per_token=10),
}
"""Name -> dimensions; those of the released Qwen3-VL by their config.json files, of Qwen3.5 by the model cards."""


def size_of(name: str) -> Size:
    """Return the size of that name; raises RecipeError if there is none."""
    if name not in SIZES:
        raise unknown_name("size", name, SIZES)
    return SIZES[name]


def make_config(name: str) -> Any:
    """Return the config of a size, with the token ids of the tiny checkpoint's tokenizer."""
    import transformers

    size = size_of(name)
    ids = _tokenizer(name).convert_tokens_to_ids
    vision: dict[str, Any] = {
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 2304,
    }
    if size.deepstack:
        vision["deepstack_visual_indexes"] = list(size.deepstack)
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    borders = {"start": "<|vision_start|>", "end": "<|vision_end|>"}
    tokens = {f"{kind}_token_id": ids(token) for kind, token in special.items()}
    tokens |= {f"vision_{kind}_token_id": ids(token) for kind, token in borders.items()}
    cls: Any = getattr(transformers, KINDS[size.kind].config)
    return cls(text_config=_text(size), vision_config=vision, tie_word_embeddings=size.tied, **tokens)


def _text(size: Size) -> dict[str, Any]:
    """Return the fields of the language model's config."""
    kind = KINDS[size.kind]
    text: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": size.tied,
        "rope_parameters": kind.rope_parameters(size.head_dim),
    }
    known = {
        "intermediate_size": size.mlp,
        "num_experts": size.experts,
        "num_experts_per_tok": size.experts_per_token,
        "moe_intermediate_size": size.mlp,
        "shared_expert_intermediate_size": size.mlp,
    }
    if size.delta_heads:
        heads = dict(zip(("linear_num_key_heads", "linear_num_value_heads"), size.delta_heads, strict=True))
        known |= heads | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), size.delta_head_dim)
    return text | {name: value for name, value in known.items() if name in kind.text_sizes}


def write_size(name: str, folder: Path) -> None:
    """Write config and processor of a size, without weights, so that a recipe can use the folder as its model."""
    make_config(name).save_pretrained(folder)
    bench_processor(name).save_pretrained(folder)


def bench_processor(name: str = "tiny", *, min_pixels: int = 1024, max_pixels: int = 1 << 24) -> Any:
    """Return a size's processor: the tiny checkpoint's tokenizer and template, and areas of images in pixels."""
    areas = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return make_processor(_tokenizer(name), TINY | areas, KINDS[size_of(name).kind])


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


def _tokenizer(name: str) -> Any:
    return make_tokenizer(TINY["vocab_words"], KINDS[size_of(name).kind])
