"""Loads a model and its processor from a directory or hub id. The model class follows from config.json alone."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, RecipeError, one_line, unknown_name
from qwenvl_ft.model.adapters.load import base_of_adapter, trained_lengths, with_adapter
from qwenvl_ft.model.anatomy import family_of
from qwenvl_ft.model.choose_attention import resolve_attn_impl
from qwenvl_ft.model.config import apply_lengths, check_devices, expand_device_map, parse_max_memory
from qwenvl_ft.model.packed_attention import TEXT_NAME, sample_lengths, use_packed_attention
from qwenvl_ft.model.patch_embed import PATCH_EMBEDS, use_linear_patch_embed
from qwenvl_ft.model.placed_media import use_media_places
from qwenvl_ft.model.processor import set_limits
from qwenvl_ft.model.quantization import bnb_config, log_quantized, require_kernels, use_trainable_kernels
from qwenvl_ft.model.released_layout import use_released_layout
from qwenvl_ft.model.source import PROCESSOR_FILES, load_config, local_directory, require_index
from qwenvl_ft.upstream.delta_net import restart_at_borders
from qwenvl_ft.upstream.expert_layout import loading_layout, stored_experts, stored_layout
from qwenvl_ft.upstream.experts import experts_implementation
from qwenvl_ft.upstream.image_positions import require_image_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qwenvl_ft.recipe.schema import ModelConfig, QuantizationConfig

DTYPES = ("bfloat16", "float16", "float32", "auto")
"""Values of ``model.torch_dtype``; ``auto`` keeps the dtype that the checkpoint names."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Keyword arguments of `load_model`; most are keys of a recipe's ``model`` section."""

    torch_dtype: str = "bfloat16"
    """One of ``DTYPES``."""
    attn_impl: str = "auto"
    """One of ``ATTENTION_NAMES``, see `resolve_attn_impl`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is ``main``."""
    device_map: str | int | dict[str, Any] | None = None
    """``auto`` and the like, one device (``cuda:0`` or its number), or a dict (or its JSON) of module names, in which
    ``model.layers.0-15`` means sixteen layers. For a single process only."""
    max_memory: str | dict[Any, Any] | None = None
    """Device -> size, as ``{"0": "40GB", "cpu": "100GB"}``; needs ``device_map``."""
    rope_scaling: str | dict[str, Any] | None = None
    """``linear``, ``dynamic``, ``yarn``, or a dict (or its JSON) with ``type`` and ``factor``. M-RoPE's sections stay
    as they are."""
    max_model_len: int | None = None
    """Longest sequence to prepare for, in tokens; beyond the model's own only together with ``rope_scaling``."""
    patch_embed: str = "linear"
    """``linear`` computes the patch embedding as a matrix product (same weights), ``conv3d`` as transformers does."""
    model_type: str | None = None
    """If given, config.json must name this model type. It does not select the class."""
    quantization: QuantizationConfig | None = None
    """The recipe's section. An adapter can be trained on the quantised model, its own weights cannot."""


def load_model(dir_or_id: str | Path, options: LoadOptions | None = None, **changes: Any) -> Any:
    """Load a Qwen-VL model, ready for packed rows: no key-value cache is built unless a call asks for one.

    transformers reads packed positions only while ``use_cache`` is off, so it is off in the config of the model and of
    its text model; ``generate`` turns it on for itself. Only safetensors are read, and no code from the hub runs.

    Args:
        dir_or_id: a model directory, a hub id, or an adapter's directory (its base model is loaded first; the result
            is a PeftModel for inference).
        options: as `loading_options` makes them of a recipe.
        changes: fields of `LoadOptions` by name, which take precedence over ``options``.

    Example:
        ``load_model("Qwen/Qwen3-VL-4B-Instruct", torch_dtype="float32", attn_impl="sdpa")``

    Raises:
        CheckpointError: not a supported model, or its weights are damaged or incomplete.
        RecipeError: an option has a wrong value.
    """
    options = replace(options or LoadOptions(), **changes)
    plan = plan_loading(dir_or_id, options)
    model = _from_pretrained(plan)
    log_quantized(model)
    use_released_layout(model)
    use_packed_rows(model, attention=plan.attention, patch_embed=options.patch_embed)
    return model if plan.adapter is None else with_adapter(model, plan.adapter)


def loading_options(model: ModelConfig, quantization: QuantizationConfig) -> LoadOptions:
    """Return the options that a recipe's ``model`` and ``quantization`` sections ask for."""
    section = {entry.name: getattr(model, entry.name) for entry in fields(model) if entry.name != "model"}
    return LoadOptions(revision=section.pop("model_revision"), quantization=quantization, **section)


def use_packed_rows(model: PreTrainedModel, *, attention: str, patch_embed: str) -> None:
    """Prepare a new model for packed rows, in place. Its weights do not change.

    Args:
        attention: see `LoadPlan`.
        patch_embed: see `LoadOptions`.
    """
    if patch_embed == "linear":
        use_linear_patch_embed(model)
    if attention == TEXT_NAME:
        use_packed_attention(model)
    use_media_places(model)
    restart_at_borders(model, sample_lengths)
    turn_cache_off(model)


def turn_cache_off(model: PreTrainedModel) -> None:
    """Set ``use_cache`` to False in the configs of the model and its text model; `generate` has its own setting."""
    configs: tuple[Any, ...] = model.config, model.config.get_text_config()
    for config in configs:
        config.use_cache = False


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Everything needed to load a model: checked, before any weight is read."""

    source: str
    """Directory or hub id of the weights; for an adapter, those of its base model."""
    adapter: Path | None
    """The adapter's directory, if the caller named one."""
    config: PreTrainedConfig
    """The model's config, with rope scaling and the longest sequence set."""
    attention: str
    """One of ``ATTENTION_NAMES`` except ``auto``."""
    kwargs: dict[str, Any]
    """Further arguments of ``from_pretrained``."""


def plan_loading(dir_or_id: str | Path, options: LoadOptions) -> LoadPlan:
    """Check everything about loading a model that can be checked without its weights.

    Raises:
        CheckpointError, RecipeError: as `load_model`.
    """
    for key, known in (("torch_dtype", DTYPES), ("patch_embed", PATCH_EMBEDS)):
        if getattr(options, key) not in known:
            raise unknown_name(f"model.{key}", getattr(options, key), known)
    path, adapter = local_directory(dir_or_id), None
    if path is not None and (path / "adapter_config.json").is_file():
        adapter = path
        dir_or_id, options = _base_model(adapter, options)
        path = local_directory(dir_or_id)
        if path is not None and (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{adapter} is an adapter of {path}, which is an adapter too. Merge {path} first.")
    if path is not None:
        require_index(path)
    source = str(path or dir_or_id)
    attention = resolve_attn_impl(options.attn_impl, options.torch_dtype)
    config = load_config(source, revision=options.revision, model_type=options.model_type)
    require_image_positions(config.model_type)
    text_config = config.get_text_config()
    apply_lengths(text_config, rope_scaling=options.rope_scaling, max_model_len=options.max_model_len)
    kwargs = {
        "dtype": options.torch_dtype,
        "attn_implementation": "sdpa" if attention == TEXT_NAME else attention,
        "revision": options.revision or "main",
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # then transformers reports them instead of raising
    }
    kwargs |= experts_implementation(config, options.torch_dtype)
    kwargs |= _placement(options.device_map, options.max_memory, config)
    require_kernels(config)
    use_trainable_kernels(config)
    if options.quantization is not None and options.quantization.quantization_bit is not None:
        kwargs["quantization_config"] = bnb_config(options.quantization, config)
    return LoadPlan(source=source, adapter=adapter, config=config, attention=attention, kwargs=kwargs)


def load_processor(dir_or_id: str | Path, *, revision: str | None = None, **limits: Any) -> Any:
    """Load the processor (tokenizer, image and video processor, chat template) and set its limits.

    Args:
        limits: keyword arguments of `set_limits`.

    Raises:
        CheckpointError: there is no processor.
        RecipeError: a minimum above its maximum, or an area below 1.
    """
    from transformers import AutoProcessor

    path = local_directory(dir_or_id)
    if path is not None and not any((path / name).is_file() for name in PROCESSOR_FILES):
        if not (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path} has no processor: it contains none of {', '.join(PROCESSOR_FILES)}.")
        dir_or_id, revision = base_of_adapter(path)
        path = local_directory(dir_or_id)
    try:
        processor = AutoProcessor.from_pretrained(str(path or dir_or_id), revision=revision or "main")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the processor of {dir_or_id}: {one_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{dir_or_id} holds a {type(processor).__name__}, not a processor of images and text.")
    set_limits(processor, **limits)
    return processor


def _base_model(adapter: Path, options: LoadOptions) -> tuple[str, LoadOptions]:
    """Return an adapter's base model, and the options to load it: its revision, and the lengths of the training run."""
    if any(adapter.glob("model*.safetensors")):
        raise CheckpointError(
            f"{adapter} holds a whole model and an adapter (adapter_config.json), of different runs. Move one away."
        )
    if options.rope_scaling is None and options.max_model_len is None:
        rope_scaling, max_model_len = trained_lengths(adapter)
        options = replace(options, rope_scaling=rope_scaling, max_model_len=max_model_len)
    base, revision = base_of_adapter(adapter)
    return base, replace(options, revision=revision)


def _placement(device_map: Any, max_memory: Any, config: PreTrainedConfig) -> dict[str, Any]:
    """Return ``device_map`` and ``max_memory`` in transformers' form; empty without a device map."""
    if device_map is None:
        if max_memory is not None:
            raise RecipeError("model.max_memory needs model.device_map. Set model.device_map=auto.")
        return {}
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise RecipeError(
            f"model.device_map={device_map} spreads one model over several devices, but {world} processes run. "
            "Remove model.device_map, or start a single process."
        )
    placement: dict[str, Any] = {"device_map": expand_device_map(device_map, config)}
    if max_memory is not None:
        placement["max_memory"] = parse_max_memory(max_memory)
    check_devices(placement["device_map"], placement.get("max_memory"))
    return placement


def _from_pretrained(plan: LoadPlan) -> PreTrainedModel:
    """Read the weights.

    Raises:
        CheckpointError: weights are damaged, missing or of the wrong shape.
        RecipeError: the device map does not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    source = plan.source
    try:
        with _experts_as_stored(plan):
            model, info = auto.from_pretrained(source, config=plan.config, output_loading_info=True, **plan.kwargs)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the weights of {source}: {one_line(error)}") from error
    except ValueError as error:
        if "device_map" not in plan.kwargs:
            raise
        raise RecipeError(f"model.device_map does not fit {source}: {one_line(error)}") from error
    except RuntimeError as error:  # under ZeRO-3, transformers raises instead of reporting
        if not (mismatch := re.search(r"size mismatch for (.+?)\.?(?:\n|$)", str(error))):
            raise
        raise _other_shapes(source, mismatch.group(1)) from error
    if info["mismatched_keys"]:
        raise _other_shapes(source, sorted(map(str, info["mismatched_keys"]))[0])
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} weights of its model, the first is {missing[0]}.")
    return model


def _other_shapes(source: str, example: str) -> CheckpointError:
    return CheckpointError(f"weights of {source} do not have the shapes that its config.json gives, such as {example}.")


def _experts_as_stored(plan: LoadPlan) -> AbstractContextManager[None]:
    """Return the context in which transformers loads a model's experts by the layout of their files."""
    config = plan.config
    family = family_of(config.model_type)
    if not (family.experts and family.released_before_5) or getattr(config, "quantization_config", None) is not None:
        return nullcontext()
    folder = local_directory(plan.source)
    if folder is None:
        from huggingface_hub import snapshot_download

        files = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(plan.source, revision=plan.kwargs["revision"], allow_patterns=files))
    shapes = stored_experts(folder)
    return loading_layout(config, stored_layout(shapes, config)) if shapes else nullcontext()
