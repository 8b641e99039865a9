"""Does a model's folder hold what serving engines read: names, shapes, dtypes, tied head, and fields of config.json?

The names and shapes are those of the released checkpoints. They follow from config.json, for any size of a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.released_layout import released_shapes
from qwenvl_ft.model.source import load_config

TOP = "architectures image_token_id video_token_id vision_start_token_id vision_end_token_id vision_config text_config"
TEXT = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "rms_norm_eps max_position_embeddings rope_theta rope_scaling"
)
VISION = (
    "depth hidden_size intermediate_size num_heads out_hidden_size num_position_embeddings patch_size "
    "temporal_patch_size spatial_merge_size deepstack_visual_indexes"
)
DELTA_NET = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps "
    "max_position_embeddings rope_parameters layer_types linear_conv_kernel_dim linear_key_head_dim "
    "linear_num_key_heads linear_num_value_heads linear_value_head_dim"
)
"""Text of a model with delta nets."""
PLAIN_VISION = VISION.removesuffix(" deepstack_visual_indexes")
FIELDS: dict[str, dict[str, str]] = {
    "qwen3_vl": {"": TOP, "text_config": TEXT, "vision_config": VISION},
    "qwen3_vl_moe": {
        "": TOP,
        "text_config": f"{TEXT} num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob",
        "vision_config": VISION,
    },
    "qwen3_5": {"": TOP, "text_config": f"{DELTA_NET} intermediate_size", "vision_config": PLAIN_VISION},
    "qwen3_5_moe": {
        "": TOP,
        "text_config": f"{DELTA_NET} num_experts num_experts_per_tok moe_intermediate_size "
        "shared_expert_intermediate_size",
        "vision_config": PLAIN_VISION,
    },
}
"""``model_type`` -> section of config.json ("" is its top) -> fields that vLLM 0.33 or SGLang 0.5.23 read and the
released models have. A type without an entry is checked by its tensors only."""


def require_released(folder: Path) -> int:
    """Check a whole model before it is served; only headers of files are read.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: a field, a tensor or a shape differs from a released model of this config, tensors have
            several dtypes, or dtypes that are not the config's; the message names the first one.
    """
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _require_fields(folder, written)
    found = dict(_headers(folder))
    if "quantization_config" in written:
        return len(found)
    expected = released_shapes(load_config(str(folder)))
    lacking, left = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if lacking:
        raise CheckpointError(f"{folder} lacks {len(lacking)} tensors of a released model, the first is {lacking[0]}.")
    if left:
        raise CheckpointError(
            f"{folder} has {len(left)} tensors that serving engines do not read, the first is {left[0]}. Save the "
            "model with this package, or load it with plain transformers and merge again."
        )
    for name, (shape, _) in found.items():
        if shape != expected[name]:
            raise CheckpointError(f"{folder}: {name} has shape {shape}, but a released model has {expected[name]}.")
    _require_one_dtype(folder, written, found)
    return len(found)


def _require_fields(folder: Path, written: dict[str, Any]) -> None:
    for section, names in FIELDS[written["model_type"]].items() if written["model_type"] in FIELDS else ():
        values = written[section] if section else written
        for name in names.split():
            if name not in values:
                where = f"{section}.{name}" if section else name
                raise CheckpointError(f"config.json of {folder} lacks {where}, which serving engines read.")


def _require_one_dtype(folder: Path, written: dict[str, Any], found: dict[str, tuple[tuple[int, ...], str]]) -> None:
    dtypes = {dtype: name for name, (_, dtype) in found.items()}
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    stated = written["dtype"] if "dtype" in written else written.get("torch_dtype")
    if len(dtypes) > 1 or names.get(next(iter(dtypes))) != stated:
        shown = ", ".join(f"{names.get(dtype, dtype)} ({name})" for dtype, name in sorted(dtypes.items()))
        raise CheckpointError(f"{folder}: config.json says dtype {stated}, but the tensors are {shown}.")


def _headers(folder: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Yield (name, (shape, dtype of safetensors)) of all tensors; every file must be named by the index, if any."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file. Serving engines and this package read no other.")
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    entry = opened.get_slice(name)
                    yield name, (tuple(entry.get_shape()), entry.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
