"""Writes a complete checkpoint in a second, without a download: the real classes at toy size.

    qwenvl-ft tiny /tmp/tiny [--moe] [--family qwen3_5]

The directory has all files of a released checkpoint: config, safetensors, generation config, tokenizer, image and video
processor, chat template. Plain transformers loads it with ``from_pretrained``. 0.9M random parameters by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, hint
from qwenvl_ft.model.released_layout import use_released_layout
from qwenvl_ft.upstream.unused import unused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

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
bytes; the special tokens follow. ``deepstack_visual_indexes`` are the ViT blocks that feed a deepstack merger. Pixels
are areas: of one image, and of a whole video (frames x height x width). A family ignores the sizes of parts that it
does not have. ``moe_intermediate_size`` is neither
``hidden_size`` nor half of it: transformers 5 would read square weights of experts transposed."""

_TEXT_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
)
_DENSE_SIZES = ("intermediate_size",)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_DELTA_NET_SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What distinguishes the checkpoints of one model type."""

    config: str
    """Class of transformers."""
    text_sizes: tuple[str, ...]
    """Keys of ``SIZES`` in the text model's config."""
    tokenizer: str = "qwen2.Qwen2Tokenizer"
    """Class in a module ``transformers.models.MODULE``, whose ``tokenization_MODULE`` has ``PRETOKENIZE_REGEX``."""
    template: str = "chat_template.jinja"
    size_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sizes for which this type has another default."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """Further ``rope_parameters``."""
    has_deepstack: bool = True
    released_sections: tuple[int, int, int] = (24, 20, 20)
    """Frequencies for time, height and width in the released models."""


_QWEN3_5: dict[str, Any] = {
    "tokenizer": "qwen3_5.Qwen3_5Tokenizer",
    "template": "chat_template_qwen3_5.jinja",
    "size_defaults": {"head_dim": 32},
    "rope": {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
    "has_deepstack": False,
    "released_sections": (11, 11, 10),
}
KINDS = {
    "qwen3_vl": Kind(config="Qwen3VLConfig", text_sizes=_TEXT_SIZES + _DENSE_SIZES),
    "qwen3_vl_moe": Kind(config="Qwen3VLMoeConfig", text_sizes=_TEXT_SIZES + _DENSE_SIZES + _EXPERT_SIZES),
    "qwen3_5": Kind(config="Qwen3_5Config", text_sizes=_TEXT_SIZES + _DENSE_SIZES + _DELTA_NET_SIZES, **_QWEN3_5),
    "qwen3_5_moe": Kind(
        config="Qwen3_5MoeConfig",
        text_sizes=_TEXT_SIZES + _EXPERT_SIZES + _DELTA_NET_SIZES + ("shared_expert_intermediate_size",),
        **_QWEN3_5,
    ),
}
"""``model_type`` -> how to make a tiny checkpoint of it."""
TINY_FAMILIES = tuple(name for name in KINDS if f"{name}_moe" in KINDS)
"""Names that `make_tiny` takes as ``family``; each has a dense and a MoE type."""

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
"""Qwen's control tokens in the order of their ids, which follow the last word's."""

PLAIN_ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
"""Added tokens that count as text: decoding with ``skip_special_tokens`` keeps them."""

VOCABULARY_TEXT = """
You are a helpful assistant. Describe the image. What is shown in this picture? Which digit is this? Answer with one
number. The image shows a small red circle to the left of a large blue square. There are three objects in the scene:
two cats and one dog. The first is on the table, the second is under the chair, and the third is behind the door.
How many people are there? There are four people in the second picture. What colour is the car in the video? It is
green. Where does the man go? He goes into the house, then he comes out and walks along the street with his dog.
Read the text on the sign. Compare these images and say what has changed. The light is on in one and off in the other.
Locate every object and give its box as JSON: {"bbox_2d": [120, 340, 560, 780], "label": "cup"}. Yes. No. Not sure.
Is this normal or abnormal? Choose A, B, C or D and explain why. The answer is B because the edge is bright and round.
zero one two three four five six seven eight nine ten, left right top bottom, red green blue black white yellow
"""


def make_tiny(
    directory: str | Path, *, moe: bool = False, family: str = "qwen3_vl", seed: int = 0, **sizes: Any
) -> Path:
    """Write a random checkpoint, dense or MoE, and return its directory.

    The same arguments give the same bytes. torch's random state does not change.

    Args:
        moe: write a mixture of experts (such as a Qwen3VLMoeForConditionalGeneration) instead of a dense model.
        family: one of ``TINY_FAMILIES``.
        sizes: keys of ``SIZES``.

    Raises:
        CheckpointError: an unknown size or family.
    """
    if family not in TINY_FAMILIES:
        raise CheckpointError(f"there is no tiny checkpoint of the family {family!r}.{hint(family, TINY_FAMILIES)}")
    for name in sizes:
        if name not in SIZES:
            raise CheckpointError(f"unknown size {name!r} of a tiny checkpoint.{hint(name, SIZES)}")
    kind = KINDS[f"{family}_moe" if moe else family]
    size = SIZES | dict(kind.size_defaults) | sizes
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(size["vocab_words"], kind)
    make_processor(tokenizer, size, kind.template).save_pretrained(directory)
    model = make_model(tokenizer, size, kind, moe=moe, seed=seed)
    use_released_layout(model)
    with unused("deepspeed"):
        model.save_pretrained(directory)
    return directory


def make_tokenizer(vocab_words: int, kind: Kind = KINDS["qwen3_vl"]) -> PreTrainedTokenizerBase:
    """Build Qwen's tokenizer (byte-level BPE, NFC, one token per digit), trained to ``vocab_words`` on a short text."""
    module, _, name = kind.tokenizer.partition(".")
    tokenization: Any = import_module(f"transformers.models.{module}.tokenization_{module}")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenization.PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_words,
        initial_alphabet=alphabet,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        show_progress=False,
    )
    backend.train_from_iterator(VOCABULARY_TEXT.strip().split("\n"), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS])
    made: PreTrainedTokenizerBase = getattr(tokenization, name)(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    return made


def make_processor(
    tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], template: str = "chat_template.jinja"
) -> ProcessorMixin:
    """Build Qwen3-VL's processor: patches of 16, merged 2 x 2, mean and std 0.5, and areas suited to small images."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    common: dict[str, Any] = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "default_to_square": True,
        "data_format": "channels_first",
    }
    image_area = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
    video_area = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_video_pixels"]}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=image_area, **common),
        video_processor=Qwen3VLVideoProcessor(size=video_area, **common),
        tokenizer=tokenizer,
        chat_template=files("qwenvl_ft.model").joinpath(template).read_text(encoding="utf-8"),
    )


def make_model(
    tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], kind: Kind, *, moe: bool, seed: int
) -> PreTrainedModel:
    """Build the model with transformers' random initialisation, in float32."""
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, GenerationConfig

    token_ids: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = getattr(transformers, kind.config)(
        text_config=_text_config(tokenizer, size, kind, moe=moe),
        vision_config=_vision_config(size, kind),
        tie_word_embeddings=not moe,
        **token_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def _text_config(tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], kind: Kind, *, moe: bool) -> dict[str, Any]:
    # As in the released models, the table is longer than the tokenizer: rounded up to a multiple of 64.
    vocab_size = -(-len(tokenizer) // 64) * 64
    half = int(size["head_dim"] * kind.rope.get("partial_rotary_factor", 1)) // 2
    _, height, width = (half * part // sum(kind.released_sections) for part in kind.released_sections)
    return {name: size[name] for name in kind.text_sizes} | {
        "vocab_size": vocab_size,
        "tie_word_embeddings": not moe,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000,
            "mrope_section": [half - height - width, height, width],
            "mrope_interleaved": True,
            **kind.rope,
        },
    }


def _vision_config(size: dict[str, Any], kind: Kind) -> dict[str, Any]:
    deepstack = {"deepstack_visual_indexes": list(size["deepstack_visual_indexes"])} if kind.has_deepstack else {}
    return deepstack | {
        "hidden_size": size["vision_hidden_size"],
        "intermediate_size": size["vision_intermediate_size"],
        "depth": size["vision_depth"],
        "num_heads": size["vision_num_heads"],
        "out_hidden_size": size["hidden_size"],
        "num_position_embeddings": size["num_position_embeddings"],
        "initializer_range": size["initializer_range"],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }
