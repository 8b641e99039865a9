"""Applies a recipe's rope scaling and longest sequence to a model's config, and expands its device map."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, hint, unknown_name
from qwenvl_ft.model.anatomy import current_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_TYPES = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Type of ``model.rope_scaling`` -> the keys that it accepts."""

DEFAULT_ROPE_FACTOR = 2.0
"""Factor if ``model.rope_scaling`` is only a type and ``max_model_len`` is not set."""

KEPT_ROPE_KEYS = ("rope_theta", "mrope_section", "mrope_interleaved")
"""Settings that the model was trained with; a rope scaling cannot change them."""

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names that ``model.device_map`` accepts besides a device and a dict: accelerate's rules to spread layers."""


def apply_lengths(
    text_config: PreTrainedConfig, *, rope_scaling: str | dict[str, Any] | None, max_model_len: int | None
) -> None:
    """Set the rope scaling and the longest sequence in a text config.

    Without ``factor``, a scaling gets the factor that ``max_model_len`` needs, or 2. ``max_position_embeddings`` grows
    by the factor, except for ``dynamic``, which reads the unscaled length there.

    Raises:
        RecipeError: a length that the model cannot reach, or an invalid scaling.
    """
    config: Any = text_config
    rope = config.rope_parameters
    trained = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    if max_model_len is not None and max_model_len < 1:
        raise RecipeError(f"model.max_model_len={max_model_len} is not a length. Give a number of tokens, e.g. 8192.")
    if rope_scaling is None:
        if max_model_len is not None and max_model_len > config.max_position_embeddings:
            raise RecipeError(
                f"model.max_model_len={max_model_len} exceeds the model's {config.max_position_embeddings} positions. "
                "Lower it, or stretch the positions with model.rope_scaling=yarn."
            )
        return
    scaling = _parse_rope_scaling(rope_scaling)
    for key in KEPT_ROPE_KEYS:
        if key in scaling and (key not in rope or scaling[key] != rope[key]):
            raise RecipeError(
                f"model.rope_scaling.{key}={scaling[key]!r} cannot be changed: the model was trained with "
                f"{rope.get(key)!r}. Remove it."
            )
    needed = max(1.0, max_model_len / trained) if max_model_len is not None else DEFAULT_ROPE_FACTOR
    scaling.setdefault("factor", needed)
    if scaling["factor"] < needed and max_model_len is not None:
        raise RecipeError(
            f"model.rope_scaling with factor {scaling['factor']} reaches {int(trained * scaling['factor'])} positions, "
            f"but model.max_model_len={max_model_len}. Use factor {needed:g}."
        )
    if scaling["rope_type"] == "yarn":
        scaling.setdefault("original_max_position_embeddings", trained)
    config.rope_parameters = scaling | {key: rope[key] for key in KEPT_ROPE_KEYS if key in rope}
    if scaling["rope_type"] != "dynamic":
        config.max_position_embeddings = int(trained * scaling["factor"])


def _parse_rope_scaling(value: str | dict[str, Any]) -> dict[str, Any]:
    """Convert ``yarn``, ``{"type": "yarn", "factor": 2.0}`` or its JSON to transformers' dict with ``rope_type``."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        value = {"rope_type": value}
    scaling = dict(_parse_json("model.rope_scaling", value, '{"type": "yarn", "factor": 2.0}'))
    old = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", old)
    if kind not in ROPE_TYPES:
        raise unknown_name("type of model.rope_scaling", str(kind), ROPE_TYPES)
    known = (*ROPE_TYPES[kind], *KEPT_ROPE_KEYS)
    unknown = [key for key in scaling if key not in ("rope_type", *known)]
    if unknown:
        raise RecipeError(f"model.rope_scaling of type {kind}: unknown key {unknown[0]!r}.{hint(unknown[0], known)}")
    factor = scaling.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise RecipeError(f"model.rope_scaling.factor={factor!r} is not a number of at least 1. Example: 2.0.")
    if "factor" in scaling:
        scaling["factor"] = float(factor)
    return scaling


def expand_device_map(device_map: str | int | dict[str, Any], config: PreTrainedConfig) -> str | dict[str, Any]:
    """Return a device map with this model's module names and one entry per layer.

    Ranges include both ends. Names of older checkpoints (``model.layers.3``, ``visual``) are translated.

    Raises:
        RecipeError: invalid JSON, a range that is empty or goes beyond the last layer, an unknown name, a module that
            is placed twice, or weights that are not placed.

    Example:
        ``{"model.layers.0-1": 0}`` -> ``{"model.language_model.layers.0": 0, "model.language_model.layers.1": 0}``
    """
    if isinstance(device_map, str) and not device_map.lstrip().startswith("{"):
        return device_map if device_map in PLACEMENTS else _one_device(device_map)
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return {"": device_map}
    requested = _parse_json("model.device_map", device_map, '{"": 0}')
    modules = _module_names(config)
    expanded: dict[str, Any] = {}
    for name, device in requested.items():
        for single in _expand_range(name):
            known = current_name(single)
            if known not in modules:
                raise RecipeError(f"model.device_map names {single!r}, which is not a module.{_near(known, modules)}")
            if known in expanded:
                raise RecipeError(f"model.device_map places {known} twice, the second time by {name!r}. Keep one.")
            expanded[known] = _device(device)
    left = sorted(name for name in modules if name.endswith((".weight", ".bias")) and not _placed(name, expanded))
    if left:
        raise RecipeError(
            f"model.device_map leaves {len(left)} weights without a device, the first is {left[0]}. Name their "
            'modules, or place the rest with the name "", as in "": 0.'
        )
    return expanded


def check_devices(device_map: str | dict[str, Any], max_memory: dict[int | str, Any] | None = None) -> None:
    """Raise RecipeError if a device of an expanded map, or one with a memory limit, does not exist on this machine."""
    placed = device_map.items() if isinstance(device_map, dict) else ()
    named = [(device, f"model.device_map places {name or 'all'!r} on {device!r}") for name, device in placed]
    named += [(device, f"model.max_memory limits the device {device!r}") for device in max_memory or ()]
    existing = _devices()
    for device, what in named:
        if device not in ("disk", "meta") and _full_name(device) not in existing:
            raise RecipeError(f"{what}, but this machine has only {', '.join(existing)}.")


def _devices() -> list[str]:
    """Return the names of this machine's devices: cpu, cuda:0, cuda:1, ..."""
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()) if kind is not None)]


def _full_name(device: Any) -> str | None:
    """Return a device's name with its number (0 and ``cuda`` are ``cuda:0``); None if it is not a device."""
    import torch

    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        return None
    return parsed.type if parsed.type == "cpu" else f"{parsed.type}:{parsed.index or 0}"


def _placed(parameter: str, device_map: dict[str, Any]) -> bool:
    return any(name == "" or parameter == name or parameter.startswith(f"{name}.") for name in device_map)


def parse_max_memory(max_memory: str | dict[Any, Any]) -> dict[int | str, Any]:
    """Return device -> size, with digits in keys converted to device numbers.

    Example:
        ``{"0": "40GB", "cpu": "100GB"}`` -> ``{0: "40GB", "cpu": "100GB"}``

    Raises:
        RecipeError: not a dict, or a value that is not a size.
    """
    sizes = _parse_json("model.max_memory", max_memory, '{"0": "40GB", "cpu": "100GB"}')
    for device, size in sizes.items():
        if not isinstance(size, int) and not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B", str(size), re.IGNORECASE):
            raise RecipeError(f"model.max_memory gives {device!r} the size {size!r}. Write it as 40GB or 40GiB.")
    return {_device(device): size for device, size in sizes.items()}


def _expand_range(name: str) -> Iterable[str]:
    match = re.fullmatch(r"(.*\.)?(\d+)-(\d+)", name)
    if match is None:
        return [name]
    prefix, first, last = match.group(1) or "", int(match.group(2)), int(match.group(3))
    if first > last:
        raise RecipeError(f"model.device_map: the range in {name!r} is empty. Write {prefix}{last}-{first}.")
    return [f"{prefix}{index}" for index in range(first, last + 1)]


def _one_device(name: str) -> Any:
    import torch

    try:
        torch.device(_device(name))
    except RuntimeError as error:
        raise unknown_name("model.device_map", name, (*PLACEMENTS, "cpu", "cuda:0")) from error
    return {"": _device(name)}


def _device(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


def skeleton(config: PreTrainedConfig) -> Any:
    """Build the model on the meta device: names and shapes, but no weights.

    The model's own class builds it, so tied weights are one parameter. Do not call it once a ZeRO-3 configuration is
    active.
    """
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    known: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with torch.device("meta"):
        return known[type(config)](config)


def _module_names(config: PreTrainedConfig) -> set[str]:
    """Return the names of all modules and parameters."""
    model = skeleton(config)
    return {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}


def _near(name: str, modules: set[str]) -> str:
    """Return the end of an error about an unknown module: the range of layers, or a similar name."""
    parent, _, last = name.rpartition(".")
    layers = sorted((m for m in modules if re.fullmatch(rf"{re.escape(parent)}\.\d+", m)), key=lambda m: (len(m), m))
    if last.isdigit() and layers:
        return f" There are {layers[0]} to {layers[-1]}, {len(layers)} in all."
    return hint(name, {child for child in modules if child.count(".") < 3 and child})


def _parse_json(key: str, value: Any, example: str) -> dict[Any, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecipeError(f"{key}={value!r} is not valid JSON ({error}). Example: '{example}'.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{key}={value!r} is not a dict. Example: '{example}'.")
    return value
