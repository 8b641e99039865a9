"""Loads a saved adapter onto its base model, and reads from its folder what it was trained on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, one_line
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.recipe.provenance import saved_recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def with_adapter(model: PreTrainedModel | PeftModel, adapter: str | Path, *, name: str = "default") -> Any:
    """Load an adapter onto a model, for inference.

    Args:
        model: the base model, or a PeftModel that gets one more adapter (select it by ``set_adapter(name)``).
        adapter: folder of the adapter.
        name: name of the adapter in the PeftModel.

    Returns:
        A PeftModel.

    Raises:
        CheckpointError: the adapter belongs to another model, lacks weights, or was trained with a rope scaling that
            the model does not have.
    """
    scaling, _ = trained_lengths(Path(adapter))
    config: Any = model.config
    if scaling is not None and config.get_text_config().rope_parameters["rope_type"] == "default":
        raise CheckpointError(
            f"{adapter} was trained with rope_scaling={scaling}, but the model was loaded without it. Load the model "
            "with the same rope_scaling, or pass the adapter's folder to load_model."
        )
    from qwenvl_ft.upstream.peft import load_onto, unmatched

    register_adapters()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = load_onto(model, str(adapter), name)
    except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
        raise CheckpointError(f"{adapter} does not fit {model.name_or_path}: {one_line(error)}") from error
    missing, unexpected = unmatched(wrapped, str(adapter), name)
    if missing:
        raise CheckpointError(
            f"{adapter} does not fit {model.name_or_path}: it lacks {len(missing)} weights, the first is {missing[0]}."
        )
    if unexpected:
        raise CheckpointError(
            f"{adapter} does not fit {model.name_or_path}, which has no place for {len(unexpected)} of its weights, "
            f"the first is {unexpected[0]}."
        )
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return wrapped


def base_of_adapter(path: Path) -> tuple[str, str | None]:
    """Return the directory or hub id of an adapter's base model, and its revision.

    Raises:
        CheckpointError: adapter_config.json names no base model, or a directory that does not exist.
    """
    try:
        written = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = written["base_model_name_or_path"], written.get("revision")
        if not isinstance(base, str) or not base:
            raise KeyError("base_model_name_or_path")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/adapter_config.json does not name its base model: {error}") from error
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise CheckpointError(
            f"{path} is an adapter of {base}, which does not exist. "
            "Correct base_model_name_or_path in its adapter_config.json."
        )
    return base, revision


def trained_lengths(adapter: Path) -> tuple[Any, int | None]:
    """Return ``rope_scaling`` and ``max_model_len`` of the run that trained an adapter.

    They come from the recipe saved beside the adapter: the config of the base model has neither.
    """
    section = saved_recipe(adapter).get("model") or {}
    return section.get("rope_scaling"), section.get("max_model_len")
