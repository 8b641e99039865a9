"""Writes a complete checkpoint in a second, without a download: the real classes at toy size.

    qwenvl-ft tiny /tmp/tiny [--moe] [--family qwen3_5]

The directory has all files of a released checkpoint: config, safetensors, generation config, tokenizer, image and video
processor, chat template. Plain transformers loads it with ``from_pretrained``. 0.9M random parameters by default.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, hint
from qwenvl_ft.model.released_layout import use_released_layout
from qwenvl_ft.model.tiny_kinds import KINDS, SIZES, TINY_FAMILIES, Kind
from qwenvl_ft.upstream.unused import unused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

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
        CheckpointError: an unknown size or family, or a family without a mixture of experts.
    """
    if family not in TINY_FAMILIES:
        raise CheckpointError(f"there is no tiny checkpoint of the family {family!r}.{hint(family, TINY_FAMILIES)}")
    if moe and f"{family}_moe" not in KINDS:
        raise CheckpointError(f"the family {family!r} has no mixture of experts. Drop moe (--moe).")
    for name in sizes:
        if name not in SIZES:
            raise CheckpointError(f"unknown size {name!r} of a tiny checkpoint.{hint(name, SIZES)}")
    kind = KINDS[f"{family}_moe" if moe else family]
    size = SIZES | dict(kind.size_defaults) | sizes
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(size["vocab_words"], kind)
    make_processor(tokenizer, size, kind).save_pretrained(directory)
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
    tokenizer: PreTrainedTokenizerBase, size: dict[str, Any], kind: Kind = KINDS["qwen3_vl"]
) -> ProcessorMixin:
    """Build the processor: patches and normalisation as released, merged 2 x 2, and areas suited to small images."""
    import transformers

    common: dict[str, Any] = {
        "patch_size": kind.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(kind.pixel_mean),
        "image_std": list(kind.pixel_std),
        "default_to_square": True,
        "data_format": "channels_first",
    }
    image_area = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
    video_area = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_video_pixels"]}
    made: ProcessorMixin = getattr(transformers, kind.processor)(
        image_processor=transformers.Qwen2VLImageProcessor(size=image_area, **common),
        video_processor=getattr(transformers, kind.video_processor)(size=video_area, **common),
        tokenizer=tokenizer,
        chat_template=files("qwenvl_ft.model").joinpath(kind.template).read_text(encoding="utf-8"),
    )
    return made


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
    control = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return (
        {name: size[name] for name in kind.text_sizes}
        | (control if kind.has_control_ids else {})
        | {
            "vocab_size": vocab_size,
            "tie_word_embeddings": not moe,
            "rope_parameters": kind.rope_parameters(size["head_dim"]),
        }
    )


def _vision_config(size: dict[str, Any], kind: Kind) -> dict[str, Any]:
    sizes = {name: size[key] for name, key in kind.vision_sizes.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()} | {
        "patch_size": kind.patch_size,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
    }
