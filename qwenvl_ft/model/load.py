"""A directory or hub id -> model and processor. What it is follows from its config.json, never from its name."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import CheckpointError, RecipeError, one_line, unknown_name
from qwenvl_ft.model.anatomy import canonical_model_type, family_of
from qwenvl_ft.model.attention import resolve_attn_impl
from qwenvl_ft.model.config import apply_lengths, check_devices, expand_device_map, parse_max_memory
from qwenvl_ft.model.packed_attention import TEXT_NAME, use_packed_attention
from qwenvl_ft.model.patch_embed import PATCH_EMBEDS, use_linear_patch_embed
from qwenvl_ft.model.placed_media import use_media_places
from qwenvl_ft.model.quantization import bnb_config, require_kernels, tell_quantized
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.upstream.experts import experts_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qwenvl_ft.recipe.schema import ModelConfig, QuantizationConfig

DTYPES = ("bfloat16", "float16", "float32", "auto")
"""What ``model.torch_dtype`` accepts; ``auto`` keeps the dtype that the checkpoint names."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_model(
    dir_or_id: str | Path,
    *,
    torch_dtype: str = "bfloat16",
    attn_impl: str = "auto",
    revision: str | None = None,
    device_map: str | int | dict[str, Any] | None = None,
    max_memory: str | dict[Any, Any] | None = None,
    rope_scaling: str | dict[str, Any] | None = None,
    max_model_len: int | None = None,
    patch_embed: str = "linear",
    model_type: str | None = None,
    quantization: QuantizationConfig | None = None,
) -> Any:
    """Load a Qwen-VL model, ready for packed rows: no key-value cache is built unless a call asks for one.

    transformers reads packed positions only while ``use_cache`` is off, so it is off in the model's and the text
    model's config; ``generate`` turns it on for itself. Safetensors only, no code from the hub.

    Args:
        dir_or_id: a model directory, a hub id, or an adapter's directory (its base model is loaded first; the result
            is a PeftModel for inference).
        attn_impl: one of ``ATTENTION_NAMES``, see `resolve_attn_impl`.
        device_map: ``auto`` and the like, one device (``cuda:0`` or its number), or a dict (or its JSON) of module
            names; ``model.layers.0-15`` stands for sixteen layers. For one process only.
        max_memory: device -> size, as ``{"0": "40GB", "cpu": "100GB"}``; needs ``device_map``.
        rope_scaling: ``linear``, ``dynamic``, ``yarn``, or a dict (or its JSON) with ``type`` and ``factor``. M-RoPE's
            sections stay as they are.
        max_model_len: longest sequence to prepare for; beyond the model's own only together with ``rope_scaling``.
        patch_embed: ``linear`` computes the patch embedding as a matrix product (same weights), ``conv3d`` as upstream.
        model_type: a check, not a choice: an error unless config.json says the same.
        quantization: a recipe's section; an adapter can be trained over the result, its weights cannot.

    Raises:
        CheckpointError: not a model, not a supported one, or its weights are damaged or incomplete.
        RecipeError: an option has a wrong value.
    """
    plan = plan_loading(
        dir_or_id,
        torch_dtype=torch_dtype,
        attn_impl=attn_impl,
        revision=revision,
        device_map=device_map,
        max_memory=max_memory,
        rope_scaling=rope_scaling,
        max_model_len=max_model_len,
        patch_embed=patch_embed,
        model_type=model_type,
        quantization=quantization,
    )
    model = _from_pretrained(plan)
    tell_quantized(model)
    use_packed_rows(model, attention=plan.attention, patch_embed=patch_embed)
    return model if plan.adapter is None else with_adapter(model, plan.adapter)


def use_packed_rows(model: Any, *, attention: str, patch_embed: str) -> None:
    """Prepare a new model for packed rows, in place; the same weights.

    Args:
        attention: as in `LoadPlan`.
    """
    if patch_embed == "linear":
        use_linear_patch_embed(model)
    if attention == TEXT_NAME:
        use_packed_attention(model)
    use_media_places(model)
    turn_cache_off(model)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a model is loaded from and with: checked, and no weight read yet."""

    source: str
    """Directory or hub id of the weights; of an adapter, its base model's."""
    adapter: Path | None
    """The adapter's directory, if that is what was named."""
    config: PreTrainedConfig
    """With the longest sequence and the rope scaling set."""
    attention: str
    """One of ``ATTENTION_NAMES`` except ``auto``."""
    options: dict[str, Any]
    """The rest of what ``from_pretrained`` is told."""


def plan_loading(
    dir_or_id: str | Path,
    *,
    torch_dtype: str = "bfloat16",
    attn_impl: str = "auto",
    revision: str | None = None,
    device_map: str | int | dict[str, Any] | None = None,
    max_memory: str | dict[Any, Any] | None = None,
    rope_scaling: str | dict[str, Any] | None = None,
    max_model_len: int | None = None,
    patch_embed: str = "linear",
    model_type: str | None = None,
    quantization: QuantizationConfig | None = None,
) -> LoadPlan:
    """Check everything about loading a model that needs no weights; the arguments and errors of `load_model`."""
    for key, value, known in (("torch_dtype", torch_dtype, DTYPES), ("patch_embed", patch_embed, PATCH_EMBEDS)):
        if value not in known:
            raise unknown_name(f"model.{key}", value, known)
    path, adapter = local_directory(dir_or_id), None
    if path is not None and (path / "adapter_config.json").is_file():
        adapter = path
        if any(path.glob("model*.safetensors")):
            raise CheckpointError(
                f"{path} holds a whole model and an adapter (adapter_config.json), of different runs. Move one away."
            )
        if rope_scaling is None and max_model_len is None:
            rope_scaling, max_model_len = trained_lengths(path)
        dir_or_id, revision = base_of_adapter(path)
        path = local_directory(dir_or_id)
        if path is not None and (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{adapter} is an adapter of {path}, an adapter too. Merge that one first.")
    source = str(path or dir_or_id)
    attention = resolve_attn_impl(attn_impl, torch_dtype)
    config = load_config(source, revision=revision, model_type=model_type)
    apply_lengths(config.get_text_config(), rope_scaling=rope_scaling, max_model_len=max_model_len)
    options = {
        "dtype": torch_dtype,
        "attn_implementation": "sdpa" if attention == TEXT_NAME else attention,
        "revision": revision or "main",
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # it says which; without, it raises
    }
    options |= experts_implementation(config, torch_dtype) | _placement(device_map, max_memory, config)
    require_kernels(config)
    if quantization is not None and quantization.quantization_bit is not None:
        options["quantization_config"] = bnb_config(quantization, config)
    return LoadPlan(source=source, adapter=adapter, config=config, attention=attention, options=options)


def trained_lengths(adapter: Path) -> tuple[Any, int | None]:
    """``rope_scaling`` and ``max_model_len`` that an adapter was trained with; its base model's config has neither."""
    told = saved_recipe(adapter).get("model") or {}
    return told.get("rope_scaling"), told.get("max_model_len")


def loading_options(told: ModelConfig, quantization: QuantizationConfig) -> dict[str, Any]:
    """A recipe's ``model`` and ``quantization`` as the keyword arguments of `load_model` and `plan_loading`."""
    own = {entry.name: getattr(told, entry.name) for entry in fields(told) if entry.name != "model"}
    return own | {"revision": own.pop("model_revision"), "quantization": quantization}


def load_processor(
    dir_or_id: str | Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_min_pixels: int | None = None,
    video_max_pixels: int | None = None,
    video_frame_max_pixels: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    revision: str | None = None,
) -> Any:
    """Load the processor (tokenizer, image and video processor, chat template) and set its areas.

    Args:
        min_pixels: smallest area of an image after resizing; one token of the language model covers 32 x 32 of
            Qwen3-VL's pixels. None keeps what the checkpoint says, and yields where it would exceed ``max_pixels``.
        max_pixels: largest area of an image, likewise.
        video_min_pixels: smallest area of a video, all its frames together.
        video_max_pixels: largest area of a video, all its frames together.
        video_frame_max_pixels: largest area of one frame, in whole tokens.
        fps: frames a second that are taken of a video file.
        min_frames: fewest frames of a file, if it has them.
        max_frames: most frames of a file.

    Raises:
        CheckpointError: there is no processor.
        RecipeError: a minimum above its maximum, or not positive.
    """
    from transformers import AutoProcessor

    path = local_directory(dir_or_id)
    if path is not None and not any((path / name).is_file() for name in PROCESSOR_FILES):
        if not (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path} has no processor: none of {', '.join(PROCESSOR_FILES)} is in it.")
        dir_or_id, revision = base_of_adapter(path)
        path = local_directory(dir_or_id)
    try:
        processor = AutoProcessor.from_pretrained(str(path or dir_or_id), revision=revision or "main")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the processor of {dir_or_id}: {one_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{dir_or_id} holds a {type(processor).__name__}, not a processor of images and text.")
    _set_areas(processor.image_processor, "", min_pixels, max_pixels)
    _set_areas(processor.video_processor, "video_", video_min_pixels, video_max_pixels)
    _set_frames(processor.video_processor, video_frame_max_pixels, fps, min_frames, max_frames)
    return processor


def load_config(source: str, *, revision: str | None = None, model_type: str | None = None) -> PreTrainedConfig:
    """The config of a supported model.

    Raises:
        CheckpointError: there is none, it cannot be read, or its ``model_type`` is not supported.
        RecipeError: ``model_type`` names another family.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    try:
        written = PreTrainedConfig.get_config_dict(source, revision=revision or "main")[0]
    except (OSError, ValueError) as error:
        where = "" if Path(source).is_dir() else " It is no directory here, and the hub did not give it."
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
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json of {source} is not valid: {one_line(error)}") from error


def local_directory(dir_or_id: str | Path) -> Path | None:
    """The directory, or None for a hub id.

    Raises:
        CheckpointError: it reads like a path but is none, or the directory holds neither model nor adapter.
    """
    text = str(dir_or_id)
    path = Path(text).expanduser()
    if path.is_file():
        raise CheckpointError(f"{path} is a file. Give the directory that holds config.json.")
    if not path.is_dir():
        reads_like_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1
        if reads_like_path or isinstance(dir_or_id, Path):
            raise CheckpointError(f"no such model directory: {path}")
        return None
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json", *PROCESSOR_FILES)):
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
        fix = f"Did you mean {checkpoints[-1]}?" if checkpoints else "Give a directory written by save_pretrained."
        raise CheckpointError(f"{path} has no config.json, so it is not a model directory. {fix}")
    return path


def turn_cache_off(model: Any) -> None:
    """Set ``use_cache`` to False in the config of the model and of its text model; `generate` keeps its own."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False


def _placement(device_map: Any, max_memory: Any, config: PreTrainedConfig) -> dict[str, Any]:
    """``device_map`` and ``max_memory`` as transformers takes them; empty if neither is given."""
    if device_map is None:
        if max_memory is not None:
            raise RecipeError("model.max_memory needs model.device_map. Set model.device_map=auto.")
        return {}
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise RecipeError(
            f"model.device_map={device_map} places one model over devices, but {world} processes run. "
            "Remove model.device_map, or start one process."
        )
    placement: dict[str, Any] = {"device_map": expand_device_map(device_map, config)}
    check_devices(placement["device_map"])
    if max_memory is not None:
        placement["max_memory"] = parse_max_memory(max_memory)
    return placement


def _from_pretrained(plan: LoadPlan) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    source, options = plan.source, plan.options
    try:
        model, info = auto.from_pretrained(source, config=plan.config, output_loading_info=True, **options)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the weights of {source}: {one_line(error)}") from error
    except ValueError as error:
        if "device_map" not in options:
            raise
        raise RecipeError(f"model.device_map does not fit {source}: {one_line(error)}") from error
    if info["mismatched_keys"]:
        name = sorted(map(str, info["mismatched_keys"]))[0]
        raise CheckpointError(f"weights of {source} do not have the shapes its config.json says, as {name}.")
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} weights of its model, the first is {missing[0]}.")
    return model


def with_adapter(model: Any, adapter: str | Path, *, name: str = "default") -> Any:
    """The model with an adapter on it, as a PeftModel for inference; a further one is there for ``set_adapter(name)``.

    Raises:
        CheckpointError: the adapter is not of this model, or not whole, or was trained with other positions.
    """
    scaling, _ = trained_lengths(Path(adapter))
    if scaling is not None and model.config.get_text_config().rope_parameters["rope_type"] == "default":
        raise CheckpointError(
            f"{adapter} was trained with rope_scaling={scaling}, and the model has none. Load it with that, or open "
            "the adapter by itself."
        )
    from qwenvl_ft.model.adapters import register_adapters
    from qwenvl_ft.upstream.peft import load_onto, unmatched

    register_adapters()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wrapped = load_onto(model, str(adapter), name)
    except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
        raise CheckpointError(f"{adapter} does not fit {model.name_or_path}: {one_line(error)}") from error
    missing, strange = unmatched(wrapped, str(adapter), name)
    if missing:
        raise CheckpointError(
            f"{adapter} does not fit {model.name_or_path}: it lacks {missing[0]} ({len(missing)} such)."
        )
    if strange:
        raise CheckpointError(
            f"{adapter} does not fit {model.name_or_path}, which has no place for {strange[0]} ({len(strange)} such)."
        )
    for warning in told:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return wrapped


def base_of_adapter(path: Path) -> tuple[str, str | None]:
    """Directory or hub id of an adapter's base model, and its revision.

    Raises:
        CheckpointError: adapter_config.json names none, or one that does not exist.
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


def _set_areas(processor: Any, prefix: str, smallest: int | None, largest: int | None) -> None:
    size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
    for key, value in ((f"{prefix}min_pixels", smallest), (f"{prefix}max_pixels", largest)):
        if value is not None and value < 1:
            raise RecipeError(f"template.{key}={value} is not an area. Give a number of pixels, e.g. 262144.")
    if smallest is not None and largest is not None and smallest > largest:
        raise RecipeError(
            f"template.{prefix}min_pixels={smallest} is above template.{prefix}max_pixels={largest}. Swap them."
        )
    if smallest is not None:
        size = {"shortest_edge": smallest, "longest_edge": max(smallest, size["longest_edge"])}
    if largest is not None:
        size = {"shortest_edge": min(size["shortest_edge"], largest), "longest_edge": largest}
    processor.size = type(processor.size)(**size)


def _set_frames(processor: Any, area: int | None, fps: float | None, least: int | None, most: int | None) -> None:
    """Which frames are taken, and the largest of them."""
    if area is not None:
        from qwenvl_ft.upstream.processors import set_frame_cap

        tokens = area // (processor.patch_size * processor.merge_size) ** 2
        set_frame_cap(processor, max(tokens, 1))
    for name, value in {"fps": fps, "min_frames": least, "max_frames": most}.items():
        if value is not None:
            setattr(processor, name, value)
    if processor.min_frames > processor.max_frames:
        if least is not None and most is not None:
            raise RecipeError(f"template.fps_min_frames={least} is above template.fps_max_frames={most}. Swap them.")
        if most is not None:
            processor.min_frames = most
        else:
            processor.max_frames = processor.min_frames
