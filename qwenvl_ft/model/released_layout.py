"""Saves models as the released ones are stored, whatever has trained them: names, tied head, experts, config.json.

vLLM, SGLang and transformers 4.57 read the released models' layout; transformers 5 reads it and writes another. Its
``save_pretrained`` leaves MoE experts transposed (upstream/expert_layout.py). After loading under ZeRO-3 it renames
``model.language_model.layers`` to ``model.language_model.model.layers``. Under ZeRO-1 and ZeRO-2 a tied language head
is stored a second time. Its config.json has ``rope_parameters`` and ``num_local_experts`` in place of ``rope_theta``,
``rope_scaling`` and ``num_experts``, without which transformers 4.57 does not build the model, and of models of its own
making no ``norm_topk_prob``, without which vLLM does not. Families that were released with transformers 5 are stored as
it stores them.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.anatomy import FAMILIES
from qwenvl_ft.upstream.expert_layout import EXPERTS, Layout, stored_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARD = "5GB"
"""Largest size of a file, as in the released models. While a file is written, its experts are in memory twice."""


def use_released_layout(model: PreTrainedModel) -> None:
    """Let ``model.save_pretrained`` write the released models' layout, and ``model.load_state_dict`` read both.

    Quantised models are saved as transformers does.
    """
    if "save_pretrained" in vars(model) or getattr(model, "hf_quantizer", None) is not None:
        return
    vars(model)["save_pretrained"] = partial(_save, model)
    model.register_load_state_dict_pre_hook(_to_module_layout)


def released_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json with the keys that the released models have, which all versions read."""
    text = dict(config["text_config"]) if "text_config" in config else dict(config)
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:  # other models may have several, by kind of layer
        del text["rope_parameters"]
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    if text.get("model_type") == "qwen3_vl_moe_text":  # the model always does; vLLM fails without the field
        text.setdefault("norm_topk_prob", True)
    return config | {"text_config": text} if "text_config" in config else text


def released_state(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of ``state`` under the released models' names and in their layout.

    Args:
        state: the model's own name -> whole weight, or empty on ranks that do not write.

    Raises:
        CheckpointError: expert weights have unknown shapes, or are offloaded.
    """
    transposed = _is_turned(model) and _layout_of(state, model) == "module"
    second = _second_names(model)
    written: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in second:
            continue
        if transposed and name.endswith(EXPERTS):
            if value.is_meta:
                raise CheckpointError(
                    f"{name} is offloaded and cannot be saved. Load the model without device_map to save it."
                )
            value = value.transpose(1, 2)  # a view, which save_pretrained copies one file at a time
        written[_released_name(name, model.config.model_type)] = value
    return written


def released_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors in a released checkpoint of this config, without making one of them.

    The model is built on the meta device. A language head that is tied to the embedding is not stored.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    second = _second_names(model)
    shapes = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name not in second:
            turned = (shape[0], shape[2], shape[1]) if name.endswith(EXPERTS) and _is_turned(model) else shape
            shapes[_released_name(name, config.model_type)] = turned
    return shapes


def _save(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Take the place of ``model.save_pretrained``, with the same arguments."""
    state = released_state(model, model.state_dict() if state_dict is None else state_dict)
    options |= {"is_main_process": is_main_process, "state_dict": state, "save_original_format": False}
    options.setdefault("max_shard_size", SHARD)
    type(model).save_pretrained(model, save_directory, **options)
    if is_main_process and _is_turned(model):
        file = Path(save_directory) / "config.json"
        config = released_config(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_turned(model: Any) -> bool:
    """Return True if the released models of this family are stored otherwise than transformers 5 stores them."""
    kind = model.config.model_type
    return kind not in FAMILIES or FAMILIES[kind].released_before_5


def _released_name(name: str, model_type: str) -> str:
    for pattern, replacement in FAMILIES[model_type].released_names if model_type in FAMILIES else ():
        name = re.sub(pattern, replacement, name)
    return name


def _second_names(model: nn.Module) -> set[str]:
    """Return the further names of parameters that have several, such as the tied language head."""
    seen: set[int] = set()
    second: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            second.add(name)
        seen.add(id(parameter))
    return second


def _to_module_layout(model: Any, state: dict[str, Any], *_: Any) -> None:
    """Give the weights of a state dict that is about to be loaded the model's own names and layout.

    transformers resumes a run by ``load_state_dict``, which only warns of names that it does not know.
    """
    kind = model.config.model_type
    if kind in FAMILIES and FAMILIES[kind].released_names:
        own = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for stored, name in {_released_name(name, kind): name for name in own}.items():
            if stored in state:
                state[name] = state.pop(stored)
    if _is_turned(model) and _layout_of(state, model) == "released":
        for name in [name for name in state if name.endswith(EXPERTS)]:
            state[name] = state[name].transpose(1, 2)


def _layout_of(state: dict[str, Any], model: Any) -> Layout | None:
    """Return the layout of the experts in a state dict; None without experts, or if it holds parts of them."""
    experts = {name: value for name, value in state.items() if name.endswith(EXPERTS) and isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in experts.items() if value.ndim == 3}
    return stored_layout(shapes, model.config) if shapes else None
