"""Adapter and base model -> one model that plain transformers, vLLM and the like load.

    qwenvl-ft merge output/my_run merged

Every method whose change is a change of weights can be merged, modules trained in full come along. The sum is taken in
float32, a layer at a time, and rounded once to the dtype of the result. An adapter that was trained over weights in few
bits is merged into what those weights stand for, in 16 bits: the result computes what was trained.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.load import (
    PROCESSOR_FILES,
    base_of_adapter,
    load_model,
    load_processor,
    local_directory,
    trained_lengths,
    with_adapter,
)
from qwenvl_ft.model.quantization import dequantized
from qwenvl_ft.recipe.schema import QuantizationConfig
from qwenvl_ft.upstream.unused import unused

RECIPE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge` did."""

    folder: Path
    method: str
    """``peft_type`` of the adapter."""
    layers: int
    """Layers whose weights took an update."""
    copies: int
    """Modules that were trained in full."""
    dtype: str
    mebibytes: float
    untied: bool
    """Whether the language head no longer shares the embedding's weight."""


def merge(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    torch_dtype: str = "auto",
    max_shard_size: str = "5GB",
) -> Merged:
    """Write the merged model, its processor and its generation config into a new folder.

    Args:
        checkpoint: an adapter's folder.
        out: a folder that is empty or not there yet.
        base: the base model, if it is not where ``adapter_config.json`` says.
        torch_dtype: of the result; ``auto`` is that of the base model.

    Raises:
        CheckpointError: the checkpoint is no adapter, its method changes no weight, the base model does not fit or is
            quantised itself, or ``out`` holds something. Nothing is written then.
    """
    folder, target = _adapter(checkpoint), require_new(out)
    told = trained_over(folder)
    whole = told.quantization_bit is None
    source, revision = (base, None) if base else base_of_adapter(folder)
    rope_scaling, max_model_len = trained_lengths(folder)
    model = load_model(
        source,
        revision=revision,
        torch_dtype=torch_dtype,
        attn_impl="sdpa",
        patch_embed="conv3d",
        rope_scaling=rope_scaling,
        max_model_len=max_model_len,
        quantization=told,
    )
    own = getattr(model.config, "quantization_config", None)
    if whole and own is not None:
        raise CheckpointError(
            f"the base model of {folder} is quantised (by {own.quant_method.value}), and such weights take no update. "
            "Give the model that it was made from: --base."
        )
    model = model if whole else dequantized(model)
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
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with unused("deepspeed"):
        merged.save_pretrained(partial, max_shard_size=max_shard_size)
    own_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    (load_processor(folder) if own_processor else load_processor(source, revision=revision)).save_pretrained(partial)
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
    )


def trained_over(folder: Path) -> QuantizationConfig:
    """How the base model was quantised while an adapter was trained, from the recipe beside it."""
    if not (folder / RECIPE).is_file():
        return QuantizationConfig()
    from qwenvl_ft.recipe.load import load_recipe

    return load_recipe(folder / RECIPE).quantization


def _adapter(checkpoint: str | Path) -> Path:
    """The folder of an adapter that can be merged."""
    folder = local_directory(Path(checkpoint))
    assert folder is not None
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is a whole model, with nothing to merge: serve it as it is.")
    from peft import PeftConfig

    from qwenvl_ft.model.adapters import register_adapters
    from qwenvl_ft.model.adapters.base import OwnTuner
    from qwenvl_ft.upstream.peft import tuner_of

    register_adapters()
    try:
        kind: Any = PeftConfig.from_pretrained(str(folder)).peft_type
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json is not one of peft's: {error}") from error
    tuner = tuner_of(kind)
    if tuner is None or issubclass(tuner, OwnTuner):
        raise CheckpointError(
            f"{folder} is an adapter of type {kind.value}, which changes what flows through the model and no weight, "
            f"so it cannot be merged. Serve the base model with the adapter on it: qwenvl-ft infer --model {folder}."
        )
    return folder


def require_new(out: str | Path) -> Path:
    """A folder to write into, by its full path.

    Raises:
        CheckpointError: it holds something.
    """
    target = Path(out).expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{out} holds something already. Give a folder that is empty or not there yet.")
    return target


def _untie(wrapped: Any) -> bool:
    """Give the language head a weight of its own if the adapter changes it, or the embedding, and not both alike."""
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
    """Merge in place, one layer in float32 at a time; how many layers and full copies there are."""
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
        like = next(copy.original_module.parameters()).dtype
        copy.modules_to_save.to(like)
    return len(layers), len(copies)
