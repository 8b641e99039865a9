"""Writes a complete Qwen3-VL checkpoint in a second, without a download: the real classes at toy size.

    qwenvl-ft tiny /tmp/tiny [--moe]

The directory has all files of a released checkpoint: config, safetensors, generation config, tokenizer, image and video
processor, chat template. Plain transformers loads it with ``from_pretrained``. 0.9M random parameters by default.
"""

from __future__ import annotations

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
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "initializer_range": 0.02,
    "min_pixels": 1024,
    "max_pixels": 65536,
    "max_video_pixels": 524288,
}
"""Sizes that ``make_tiny`` accepts, with their defaults. ``vocab_words`` counts byte-level words, including the 256
bytes; the special tokens follow. ``deepstack_visual_indexes`` are the ViT blocks that feed a deepstack merger. Pixels
are areas: of one image, and of a whole video (frames x height x width). ``moe_intermediate_size`` is neither
``hidden_size`` nor half of it: transformers 5 would read square weights of experts transposed."""

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


def make_tiny(directory: str | Path, *, moe: bool = False, seed: int = 0, **sizes: Any) -> Path:
    """Write a random Qwen3-VL checkpoint, dense or MoE, and return its directory.

    The same arguments give the same bytes. torch's random state does not change.

    Args:
        moe: write a Qwen3VLMoeForConditionalGeneration instead of a Qwen3VLForConditionalGeneration.
        sizes: keys of ``SIZES``.

    Raises:
        CheckpointError: an unknown size.
    """
    for name in sizes:
        if name not in SIZES:
            raise CheckpointError(f"unknown size {name!r} of a tiny checkpoint.{hint(name, SIZES)}")
    size = SIZES | sizes
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(size["vocab_words"])
    make_processor(tokenizer, size).save_pretrained(directory)
    model = make_model(tokenizer, size, moe=moe, seed=seed)
    use_released_layout(model)
    with unused("deepspeed"):
        model.save_pretrained(directory)
    return directory


def make_tokenizer(vocab_words: int) -> PreTrainedTokenizerBase:
    """Build Qwen's tokenizer (byte-level BPE, NFC, one token per digit), trained to ``vocab_words`` on a short text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
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
    return Qwen2Tokenizer(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerBase, size: dict[str, Any]) -> ProcessorMixin:
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
        chat_template=files("qwenvl_ft.model").joinpath("chat_template.jinja").read_text(encoding="utf-8"),
    )


def make_model(tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], *, moe: bool, seed: int) -> PreTrainedModel:
    """Build the model with transformers' random initialisation, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen3VLConfig, Qwen3VLMoeConfig

    token_ids: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config=_text_config(tokenizer, size, moe=moe),
        vision_config=_vision_config(size),
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


def _text_config(tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], *, moe: bool) -> dict[str, Any]:
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "initializer_range",
    ]
    if moe:
        names += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    # As in the released models, the table is longer than the tokenizer: rounded up to a multiple of 64.
    vocab_size = -(-len(tokenizer) // 64) * 64
    half = size["head_dim"] // 2
    side = half * 20 // 64  # released: 24, 20 and 20 of 64 frequencies for time, height and width
    return {name: size[name] for name in names} | {
        "vocab_size": vocab_size,
        "tie_word_embeddings": not moe,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000,
            "mrope_section": [half - 2 * side, side, side],
            "mrope_interleaved": True,
        },
    }


def _vision_config(size: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": size["vision_hidden_size"],
        "intermediate_size": size["vision_intermediate_size"],
        "depth": size["vision_depth"],
        "num_heads": size["vision_num_heads"],
        "out_hidden_size": size["hidden_size"],
        "num_position_embeddings": size["num_position_embeddings"],
        "deepstack_visual_indexes": list(size["deepstack_visual_indexes"]),
        "initializer_range": size["initializer_range"],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }
