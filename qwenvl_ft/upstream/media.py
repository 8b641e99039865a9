"""Borrowed: the order in which ``Qwen3VLModel.forward`` puts media into a row, and the vision tower's own tables.

transformers finds the tokens of images by comparing ids, counts them, and asks the device how many patches and which
positions each image has: a dozen waits in a training step. Public hooks put the media in instead, without a copy of any
upstream body:

- a forward pre-hook of ``Qwen3VLModel`` runs ``visual``, places its ``pooler_output`` in ``inputs_embeds``, and hands
  the ``deepstack_features`` on as a keyword argument, which the text model passes to each of its layers;
- a forward pre-hook of each decoder layer takes that argument off, and adds the features of the layer before to its
  input, where ``Qwen3VLTextModel.forward`` adds them to the output of the layer before.

What is counted on: the first keyword arguments of ``Qwen3VLModel.forward``; keyword arguments that travel through the
text model into its layers; ``visual(pixels, grid_thw=...)`` with ``pooler_output`` and ``deepstack_features``: the same
in transformers 5.5 to 5.24, dense and MoE. The tables (``position_ids``, ``interp_indices``, ``interp_weights``,
``cu_seqlens``, ``max_seqlen`` as keyword arguments of ``visual``, and the functions of ``transformers.vision_utils``
that make them) are there from 5.15 on; before, the tower computes them itself.

Where the shape is another, batches go transformers' own way (`PLACES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import one_line
from qwenvl_ft.upstream.cache import named
from qwenvl_ft.upstream.probe import Feature, first, lacks, takes

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Medium -> the argument that holds its patches."""
TABLES = ("position_ids", "interp_indices", "interp_weights", "cu_seqlens", "max_seqlen")
"""What the vision tower takes instead of computing it; in a batch ``image_`` or ``video_`` stands before each."""
TEXT_ONLY = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "predicting")
"""What is said of the row's tokens: not for the vision tower, which reads borders as its own before 5.19."""
KNOWN = "bilinear", True
"""How learned positions are interpolated, and whether between the corners."""
ADDED = "placed_features"
"""The keyword argument by which features travel to the layers."""
MARK = "qwenvl_ft_placing"
"""Set on a module that has its hook. A copy of it has both; a wrapper around it has neither."""


@dataclass(frozen=True)
class Placed:
    """Features that are added to hidden states on the way through the text model."""

    tokens: Tensor
    """int64[V], the media's tokens in the row."""
    inputs: dict[nn.Module, Tensor]
    """Layer -> [V, D], added to its input."""
    added: set[nn.Module] = field(default_factory=set)
    """Layers that have taken theirs."""


def place_media(model: nn.Module, borders_suffice: Callable[[Any], bool]) -> int:
    """Let each Qwen3-VL in ``model``, dense or MoE, take rows whose media's places are known; how many there are.

    Args:
        borders_suffice: the text model's config -> whether its attention needs no text positions beside the borders
            of the samples (with both, transformers looks for borders itself, and waits).
    """
    found = 0
    for module in model.modules():
        if not _is_model(module) or MARK in vars(module):
            continue
        inner: Any = module
        inner.visual.register_forward_pre_hook(_without_text_borders, with_kwargs=True)
        classes: tuple[Any, Any] = type(inner), type(inner.config)
        deep = len(inner.config.vision_config.deepstack_visual_indexes)
        if deep < len(inner.language_model.layers) and not differs(*classes):
            inner.register_forward_pre_hook(_Placing(borders_suffice), with_kwargs=True)
            inner.language_model.register_forward_hook(_require_added, with_kwargs=True)
            setattr(inner, MARK, True)
            found += 1
    return found


def placing_model(model: nn.Module) -> Any:
    """The Qwen3-VL inside wrappers that `place_media` prepared, or a copy of one; None if there is none."""
    return next((module for module in model.modules() if MARK in vars(module)), None)


def _is_model(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    parts = {name for name, _ in module.named_children()}
    has_deepstack = hasattr(getattr(config, "vision_config", None), "deepstack_visual_indexes")
    return has_deepstack and {"visual", "language_model"} <= parts


def vision_tables(visual: Any) -> Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None:
    """(height, width) in patches -> ``position_ids`` int64[P, 2], ``interp_indices`` int64[P, 4] and
    ``interp_weights`` float32[P, 4] of a frame; None if the tower computes them itself."""
    interpolation = getattr(visual, "interpolation_mode", ""), getattr(visual, "interpolation_align_corners", None)
    return frame_tables(visual.spatial_merge_size, visual.num_grid_per_side) if interpolation == KNOWN else None


def frame_tables(merge: int, side: int) -> Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None:
    """`vision_tables` of a tower that merges ``merge * merge`` patches and has ``side * side`` learned positions."""
    return None if _no_tables() else _Tables(merge, side)


@dataclass(frozen=True)
class _Tables:
    """An object, because loader workers that are spawned take it along."""

    merge: int
    side: int

    def __call__(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        return _frame(height, width, self.merge, self.side)


@lru_cache(maxsize=256)
def _frame(height: int, width: int, merge: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import vision_utils

    grid = torch.tensor([[1, height, width]])
    positions = vision_utils.get_vision_position_ids(grid, merge)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    return positions, indices, weights


class _Placing:
    """Forward pre-hook of a ``Qwen3VLModel``; does nothing to a batch without places."""

    def __init__(self, borders_suffice: Callable[[Any], bool]) -> None:
        self.borders_suffice = borders_suffice

    def __call__(self, model: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
        kinds = [kind for kind in KINDS if f"{kind}_places" in given]
        if not kinds:
            return None
        given = named(model, arguments, given)
        own = tuple(f"{kind}_" for kind in KINDS)
        rest = {name: value for name, value in given.items() if not name.startswith(own)}
        for name in ("input_ids", "mm_token_type_ids", *KINDS.values()):
            rest.pop(name, None)
        if "cu_seq_lens_q" in rest and self.borders_suffice(model.config.get_text_config()):
            rest["position_ids"] = rest["position_ids"][-3:]
        embeds = model.get_input_embeddings()(given["input_ids"])  # [1, T, D]
        tokens = torch.cat([given[f"{kind}_places"] for kind in kinds]).to(embeds.device)
        features = (_features(model, kind, given) for kind in kinds)
        merged, *deep = (torch.cat(parts).to(embeds.device, embeds.dtype) for parts in zip(*features, strict=True))
        layers = _hooked_layers(model)
        rest["inputs_embeds"] = embeds.index_copy(1, tokens, merged[None])
        rest[ADDED] = Placed(tokens, dict(zip(layers[1:], deep, strict=False)))
        return (), rest


def _features(model: Any, kind: str, given: dict[str, Any]) -> list[Tensor]:
    """Features of a kind's media: those that take the tokens' places, and those that are added to deeper layers."""
    tables = {name: given[f"{kind}_{name}"] for name in TABLES if f"{kind}_{name}" in given and not _no_tables()}
    pixels = given[KINDS[kind]].type(model.visual.dtype)
    seen = model.visual(pixels, grid_thw=given[f"{kind}_grid_thw"], return_dict=True, **tables)
    return [seen.pooler_output, *seen.deepstack_features]


def _hooked_layers(model: Any) -> list[nn.Module]:
    """The layers of the text model as they are now (adapters wrap them, others are put between), each with its hook."""
    layers = list(model.language_model.layers)
    for layer in layers:
        if MARK not in vars(layer):
            layer.register_forward_pre_hook(_add, with_kwargs=True)
            setattr(layer, MARK, True)
    return layers


def _add(layer: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder layer: add what was placed for it, and take the argument off."""
    if ADDED not in given:
        return None
    placed: Placed = given[ADDED]
    rest = {name: value for name, value in given.items() if name != ADDED}
    features = placed.inputs.get(layer)
    if features is None:
        return arguments, rest
    placed.added.add(layer)
    name = "hidden_states"
    hidden = rest[name] if name in rest else arguments[0]
    tokens, features = placed.tokens.to(hidden.device), features.to(hidden.device, hidden.dtype)
    summed = hidden.index_copy(1, tokens, hidden.index_select(1, tokens) + features[None])
    return (arguments, rest | {name: summed}) if name in rest else ((summed, *arguments[1:]), rest)


def _require_added(text: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    """Forward hook of the text model: each layer has taken its features, or the hidden states are wrong."""
    if ADDED in given and len(given[ADDED].added) != len(given[ADDED].inputs):
        raise AssertionError("features of images were not added to the layers that they belong to")


def _without_text_borders(visual: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Forward pre-hook of the vision tower: what is said of the row's samples is not said of its frames."""
    return arguments, {name: value for name, value in given.items() if name not in TEXT_ONLY}


@cache
def differs(model_class: Any, config_class: Any) -> str:
    """Why rows whose places are known cannot take the fast way through a class of model; empty if they can.

    A model of a few hundred weights is run both ways: whatever a release changes shows in the numbers.
    """
    from transformers import AutoModel

    if reason := first(takes_keywords(model_class.forward), _zero3()):
        return reason
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            config = _small(config_class)
            experts = {"experts_implementation": "eager"} if hasattr(config.text_config, "num_experts") else {}
            model = AutoModel.from_config(config, **experts).float().eval()
            if type(model) is not model_class:
                return f"has no {model_class.__name__} of its config"
            plain, placed = _both_ways(model)
    except Exception as error:
        return f"runs another Qwen3-VL ({type(error).__name__}: {one_line(error, 80)})"
    if not torch.allclose(plain, placed, rtol=1e-4, atol=1e-5):
        return "gives a Qwen3-VL other hidden states than its hooks do"
    return ""


def _both_ways(model: Any) -> tuple[Tensor, Tensor]:
    """Hidden states of a row with an image by transformers' own way, and by the hooks."""
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 4, 2, 3]])
    positions = torch.arange(ids.shape[1]).expand(4, 1, -1)
    row = {
        "input_ids": ids,
        "position_ids": positions,
        "pixel_values": torch.randn(16, model.visual.patch_embed.proj.weight[0].numel()),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == image).int(),
    }
    with torch.no_grad():
        plain = model(**row).last_hidden_state
        model.register_forward_pre_hook(_Placing(lambda config: False), with_kwargs=True)
        tables = vision_tables(model.visual)
        if tables is not None:
            row |= {f"image_{name}": table for name, table in zip(TABLES, tables(4, 4), strict=False)}
        row["image_places"] = (ids[0] == image).nonzero(as_tuple=True)[0]
        return plain, model(**row).last_hidden_state


def _small(config_class: Any) -> Any:
    """The config of the smallest model with three deepstack features, dense or MoE."""
    wide, rotary = 8, {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": wide,
        "intermediate_size": wide,
        "num_hidden_layers": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": wide,
        "rope_parameters": rotary,
        "use_cache": False,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": wide}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": wide,
        "intermediate_size": wide,
        "num_heads": 1,
        "out_hidden_size": wide,
        "patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text |= experts if "Moe" in config_class.__name__ else {}
    return config_class(text_config=text, vision_config=vision, image_token_id=4, video_token_id=5)


def takes_keywords(function: Callable[..., Any]) -> str:
    """Why a model's forward cannot be called as it is here."""
    return takes(function, "input_ids", "inputs_embeds", "position_ids", "pixel_values", "image_grid_thw", ADDED)


def _zero3() -> str:
    """DeepSpeed shards every model that is made while it is on, the small one too: asked before, or not at all."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return "was not tried before DeepSpeed began to shard new models" if is_deepspeed_zero3_enabled() else ""


@cache
def _no_tables() -> str:
    module = "transformers.vision_utils"
    names = "get_vision_position_ids", "get_vision_interpolation_indices_and_weights", "get_vision_attention_seqlens"
    if missing := lacks(module, names):
        return missing
    from transformers import vision_utils

    given = "grid_thw", "num_grid_per_side", "mode", "align_corners", "spatial_merge_size", "kwargs"
    return first(
        takes(vision_utils.get_vision_interpolation_indices_and_weights, *given),
        takes(vision_utils.get_vision_position_ids, "grid_thw", "spatial_merge_size", "kwargs"),
    )


def _no_places() -> str:
    where = "transformers.models.qwen3_vl"
    names = f"{where}.modeling_qwen3_vl", f"{where}_moe.modeling_qwen3_vl_moe"
    if missing := first(lacks(names[0], ("Qwen3VLModel",)), lacks(names[1], ("Qwen3VLMoeModel",))):
        return missing
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

    return first(
        *(differs(*classes) for classes in ((Qwen3VLModel, Qwen3VLConfig), (Qwen3VLMoeModel, Qwen3VLMoeConfig)))
    )


PLACES = Feature(
    name="media placed by the loader's workers",
    packages=("transformers",),
    missing=_no_places,
    instead="the model looks for them itself and waits for the device about a dozen times a step",
)
POSITIONS = Feature(
    name="positions of patches computed by the loader's workers",
    packages=("transformers",),
    missing=_no_tables,
    instead="the vision tower computes them itself and waits for the device a few times a step",
)
FEATURES = (PLACES, POSITIONS)
