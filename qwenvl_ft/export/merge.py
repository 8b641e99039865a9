"""Merges an adapter into its base model; plain transformers, vLLM and others can load the result.

    qwenvl-ft merge output/my_run merged

Every method that changes weights can be merged, including its modules trained in full. Each layer is merged in float32
and rounded once to the dtype of the result. An adapter that was trained on quantised weights is merged into their
dequantised values in 16 bits, so the result computes the same as the trained model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.chat_template import write_videos
from qwenvl_ft.export.released import require_released
from qwenvl_ft.model.adapters.load import base_of_adapter, trained_lengths, with_adapter
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.model.quantization import dequantized
from qwenvl_ft.model.released_layout import use_released_layout
from qwenvl_ft.model.source import PROCESSOR_FILES, local_directory
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.recipe.schema import QuantizationConfig
from qwenvl_ft.upstream.unused import unused


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Result of `merge`."""

    folder: Path
    """Folder of the merged model."""
    method: str
    """``peft_type`` of the adapter."""
    layers: int
    """Number of layers whose weights were updated."""
    copies: int
    """Number of modules that were trained in full."""
    dtype: str
    mebibytes: float
    """Size of the weights on disk."""
    untied: bool
    """True if the language head no longer shares the embedding's weight."""
    notes: list[str]
    """What a user has to know, in sentences."""


def merge(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    torch_dtype: str = "auto",
    max_shard_size: str = "5GB",
) -> Merged:
    """Write the merged model, its processor and its generation config to a new folder.

    The chat template writes videos as in training (`write_videos`).

    Args:
        checkpoint: an adapter's folder.
        out: a folder that is empty or does not exist.
        base: the base model, if not the one that ``adapter_config.json`` names.
        torch_dtype: dtype of the result; ``auto`` is the base model's.
        max_shard_size: largest size of one safetensors file.

    Raises:
        CheckpointError: the checkpoint is not an adapter, its method does not change weights, the base model does not
            fit or is quantised, ``out`` is not empty, or the result is not stored as a released model. In all these
            cases ``out`` is not written.
    """
    folder, target = _mergeable_adapter(checkpoint), require_new(out)
    source, revision = (base, None) if base else base_of_adapter(folder)
    model = _base_model(folder, source, revision, torch_dtype)
    dtype = model.config.dtype or next(model.parameters()).dtype
    wrapped = with_adapter(model, folder)
    untied = _untie(wrapped)
    layers, copies = _merge_layers(wrapped, folder)
    try:
        merged = wrapped.base_model.unload()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be merged: {error}") from error
    for config in (merged.config, merged.config.get_text_config()):
        config.use_cache = True
        if untied:
            config.tie_word_embeddings = False
    has_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    use_released_layout(merged)  # a model that was loaded quantised does not have it yet
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with unused("deepspeed"):
        merged.save_pretrained(partial, max_shard_size=max_shard_size)
    processor = load_processor(folder) if has_processor else load_processor(source, revision=revision)
    notes = write_videos(processor, pair=False)
    processor.save_pretrained(partial)
    require_released(partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return Merged(
        folder=target,
        method=str(next(iter(wrapped.peft_config.values())).peft_type.value),
        layers=layers,
        copies=copies,
        dtype=str(dtype).removeprefix("torch."),
        mebibytes=sum(path.stat().st_size for path in target.glob("*.safetensors")) / 2**20,
        untied=untied,
        notes=notes,
    )


def trained_over(folder: Path) -> QuantizationConfig:
    """Return the quantisation that an adapter's base model had in training, from the recipe saved beside the
    adapter."""
    saved = saved_recipe(folder)
    values = saved["quantization"] if "quantization" in saved else {}
    return QuantizationConfig(**{name: values[name] for name in vars(QuantizationConfig()) if name in values})


def _base_model(folder: Path, source: str, revision: str | None, torch_dtype: str) -> Any:
    """Load an adapter's base model, dequantised if the adapter was trained on quantised weights.

    Raises:
        CheckpointError: the base model on disk is quantised.
    """
    quantization = trained_over(folder)
    rope_scaling, max_model_len = trained_lengths(folder)
    model = load_model(
        source,
        revision=revision,
        torch_dtype=torch_dtype,
        attn_impl="sdpa",
        patch_embed="conv3d",
        rope_scaling=rope_scaling,
        max_model_len=max_model_len,
        quantization=quantization,
    )
    if quantization.quantization_bit is not None:
        return dequantized(model)
    written = getattr(model.config, "quantization_config", None)
    if written is not None:
        raise CheckpointError(
            f"the base model of {folder} is quantised (by {written.quant_method.value}), and quantised weights cannot "
            "be updated. Pass the model that it was quantised from: --base."
        )
    return model


def _mergeable_adapter(checkpoint: str | Path) -> Path:
    """Return the folder of an adapter, after checking that its method can be merged."""
    folder = local_directory(Path(checkpoint))
    assert folder is not None
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is a whole model, so there is nothing to merge. Serve it as it is.")
    from peft import PeftConfig

    from qwenvl_ft.model.adapters import register_adapters
    from qwenvl_ft.model.adapters.base import OwnTuner
    from qwenvl_ft.upstream.peft import tuner_of

    register_adapters()
    try:
        kind: Any = PeftConfig.from_pretrained(str(folder)).peft_type
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json is not a peft config: {error}") from error
    tuner = tuner_of(kind)
    if tuner is None or issubclass(tuner, OwnTuner):
        raise CheckpointError(
            f"{folder} is an adapter of type {kind.value}, which changes activations, not weights, so it cannot be "
            f"merged. Serve the base model with the adapter on it: qwenvl-ft infer --model {folder}."
        )
    return folder


def require_new(out: str | Path) -> Path:
    """Return the absolute path of a folder to write to.

    Raises:
        CheckpointError: it is a file, or a folder that is not empty.
    """
    target = Path(out).expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{out} is not empty. Name a folder that is empty or does not exist.")
    return target


def _untie(wrapped: Any) -> bool:
    """Untie the language head from the embedding if the adapter changes one of them; return True if it did."""
    from qwenvl_ft.upstream.peft import is_adapted

    model = wrapped.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = [module for module in (head, embedding) if is_adapted(module)]
    if not adapted or _weight(head) is not _weight(embedding):
        return False
    base: Any = adapted[0].get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    return True


def _weight(module: Any) -> Any:
    return (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight


@torch.no_grad()
def _merge_layers(wrapped: Any, folder: Path) -> tuple[int, int]:
    """Merge in place, one layer at a time in float32; return the numbers of merged layers and of full copies."""
    from qwenvl_ft.upstream.peft import is_adapted, is_full_copy

    modules = dict(wrapped.named_modules())
    layers: dict[str, Any] = {name: module for name, module in modules.items() if is_adapted(module)}
    for name, layer in layers.items():
        dtypes = {key: value.dtype for key, value in layer.named_parameters()}
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder} cannot be merged at {name}: {error}") from error
        for key, value in layer.named_parameters():
            value.data = value.data.to(dtypes[key])
    copies = [module for module in modules.values() if is_full_copy(module)]
    for copy in copies:
        copy.modules_to_save.to(next(copy.original_module.parameters()).dtype)
    return len(layers), len(copies)
