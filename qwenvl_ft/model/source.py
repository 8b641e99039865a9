"""Finds what a model directory or hub id holds: its local path and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_ft.errors import CheckpointError, RecipeError, one_line
from qwenvl_ft.model.anatomy import canonical_model_type, family_of, layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""A directory with one of these files holds a processor."""
INDEX = "model.safetensors.index.json"
"""Says which file holds which weight, in a model of several files."""


def local_directory(dir_or_id: str | Path) -> Path | None:
    """Return the directory, or None for a hub id.

    Raises:
        CheckpointError: the text looks like a path that does not exist, or the directory holds neither a model, an
            adapter nor a processor.
    """
    text = str(dir_or_id)
    path = Path(text).expanduser()
    if path.is_file():
        raise CheckpointError(f"{path} is a file. Give the directory that holds config.json.")
    if not path.is_dir():
        looks_like_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1
        if looks_like_path or isinstance(dir_or_id, Path):
            raise CheckpointError(f"no such model directory: {path}")
        return None
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json", *PROCESSOR_FILES)):
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
        fix = f"Did you mean {checkpoints[-1]}?" if checkpoints else "Give a directory written by save_pretrained."
        raise CheckpointError(f"{path} has no config.json, so it is not a model directory. {fix}")
    return path


def require_index(folder: Path) -> None:
    """Check the index of a model of several files, which transformers reads without looking.

    Raises:
        CheckpointError: it is damaged.
    """
    file = folder / INDEX
    if not file.is_file():
        return
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        sound = bool(files) and isinstance(files, dict) and all(isinstance(name, str) for name in files.values())
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{file} is damaged: it does not say which file holds which weight. Copy it again from the model's origin."
        )


def load_config(source: str, *, revision: str | None = None, model_type: str | None = None) -> PreTrainedConfig:
    """Load the config of a supported model.

    Args:
        source: a directory or hub id.
        model_type: if given, config.json must name this type (`canonical_model_type` accepts other spellings).

    Raises:
        CheckpointError: the config is missing or cannot be read, its ``model_type`` is not supported, or its layers
            attend in sliding windows.
        RecipeError: ``model_type`` names another family.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    try:
        written = PreTrainedConfig.get_config_dict(source, revision=revision or "main")[0]
    except (OSError, ValueError) as error:
        where = "" if Path(source).is_dir() else " No such directory exists, and the hub did not return it."
        raise CheckpointError(f"cannot read the config of model {source!r}.{where} {one_line(error)}") from error
    if not isinstance(written.get("model_type"), str):
        raise CheckpointError(f"config.json of {source} names no model_type, so it is not a transformers model.")
    family_of(written["model_type"])
    if model_type is not None and canonical_model_type(model_type) != written["model_type"]:
        raise RecipeError(
            f"model.model_type={model_type}, but config.json of {source} says {written['model_type']!r}. "
            "Remove model.model_type: it is read from the config."
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json of {source} is not valid: {one_line(error)}") from error
    if "sliding_attention" in layer_kinds(config):
        raise CheckpointError(
            f"config.json of {source} sets use_sliding_window: layers that see only the last tokens are not supported. "
            "No released Qwen-VL has them; set use_sliding_window to false if yours was trained without."
        )
    return config
