"""Inserts media features into a row at positions that dataloader workers have computed, in place of the code in
``Qwen3VLModel.forward``, and passes precomputed position tables to the vision tower.

transformers finds image tokens by comparing ids, counts them, and asks the device for the number and positions of each
image's patches: about a dozen synchronisations per training step. Public hooks insert the features instead, without a
copy of any upstream code:

- A forward pre-hook of ``Qwen3VLModel`` runs ``visual``, writes its ``pooler_output`` to ``inputs_embeds``, and passes
  the ``deepstack_features`` on as a keyword argument, which the text model passes to each of its layers.
- A forward pre-hook of each decoder layer removes that argument and adds the features that belong to the previous layer
  to its input; ``Qwen3VLTextModel.forward`` adds them to the previous layer's output.

This relies on the first keyword arguments of ``Qwen3VLModel.forward``, on the text model passing keyword arguments to
its layers, and on ``visual(pixels, grid_thw=...)`` with ``pooler_output`` and ``deepstack_features``. All are the same
in transformers 5.5 to 5.24, dense and MoE. The tables are explained in vision_tables.py.

If any of this differs, batches go through transformers' own code (`PLACES`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import one_line
from qwenvl_ft.upstream.cache import named
from qwenvl_ft.upstream.probe import Feature, first, lacks, takes
from qwenvl_ft.upstream.vision_tables import TABLES, no_tables, vision_tables

KNOWN = ("qwen3_vl", "qwen3_5", "qwen2_5_vl", "qwen2_vl")
"""Beginnings of the model types whose classes have the interface above; only Qwen3-VL's with deepstack features."""
KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Medium -> the argument that holds its patches."""
TEXT_ONLY = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "predicting")
"""Arguments about the row's tokens, not meant for the vision tower, which before 5.19 reads the borders as its own."""
ADDED = "placed_features"
"""Keyword argument that carries features to the layers."""
SHARE = "row_share"
"""Keyword argument that says which part of a row this rank holds, where several ranks share it (`Share`)."""
MARK = "qwenvl_ft_placing"
"""Attribute set on modules that have the hook. A copy of such a module has both, a wrapper around it neither."""


class Share(Protocol):
    """The part of a row that this rank holds, see `qwenvl_ft.model.sequence_parallel`."""

    @property
    def features(self) -> dict[str, int]:
        """``image`` and ``video`` -> the number of features of this rank's own frames."""

    @property
    def tokens(self) -> Tensor:
        """int64[V], indices of the media tokens in this part of the row."""

    def gather(self, features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Exchange the features of the own frames for those of the own tokens."""


@dataclass(frozen=True)
class Placed:
    """Deepstack features of a row, for the layers of the text model to add."""

    tokens: Tensor
    """int64[V], indices of the media tokens in the row."""
    inputs: dict[nn.Module, Tensor]
    """Layer -> [V, D], to add to its input."""
    added: set[nn.Module] = field(default_factory=set)
    """Layers that have added theirs."""


def place_media(model: nn.Module, borders_suffice: Callable[[Any], bool]) -> int:
    """Hook each Qwen3-VL in ``model``, dense or MoE, so that it accepts rows with precomputed media positions.

    Args:
        borders_suffice: called with the text model's config; returns True if its attention isolates samples without
            text positions. (If it gets text positions as well as boundaries, transformers searches for the boundaries
            itself, and synchronises.)

    Returns:
        The number of models hooked.
    """
    found = 0
    for module in model.modules():
        if not _is_model(module) or MARK in vars(module):
            continue
        inner: Any = module
        inner.visual.register_forward_pre_hook(_without_text_borders, with_kwargs=True)
        classes: tuple[Any, Any] = type(inner), type(inner.config)
        deep = len(getattr(inner.config.vision_config, "deepstack_visual_indexes", ()))
        if deep < len(inner.language_model.layers) and not differs(*classes):
            inner.register_forward_pre_hook(_Placing(borders_suffice), with_kwargs=True)
            inner.language_model.register_forward_hook(_require_added, with_kwargs=True)
            setattr(inner, MARK, True)
            found += 1
    return found


def placing_model(model: nn.Module) -> Any:
    """Return the Qwen3-VL, inside any wrappers, that `place_media` prepared (or its copy); None if there is none."""
    return next((module for module in model.modules() if MARK in vars(module)), None)


def _is_model(module: nn.Module) -> bool:
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    return model_type.startswith(KNOWN) and {"visual", "language_model"} <= {
        name for name, _ in module.named_children()
    }


class _Placing:
    """Forward pre-hook of a ``Qwen3VLModel``; leaves a batch without places unchanged."""

    def __init__(self, borders_suffice: Callable[[Any], bool]) -> None:
        self.borders_suffice = borders_suffice

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        share: Share | None = kwargs.get(SHARE)
        kinds = [kind for kind in KINDS if f"{kind}_places" in kwargs] if share is None else list(share.features)
        if not kinds:
            return None
        kwargs = named(model, args, kwargs)
        prefixes = tuple(f"{kind}_" for kind in KINDS)
        rest = {name: value for name, value in kwargs.items() if not name.startswith(prefixes)}
        for name in ("input_ids", "mm_token_type_ids", *KINDS.values()):
            rest.pop(name, None)
        if "cu_seq_lens_q" in rest and self.borders_suffice(model.config.get_text_config()):
            rest["position_ids"] = rest["position_ids"][-3:]
        embeds = model.get_input_embeddings()(kwargs["input_ids"])  # [1, T, D]
        features = [_features(model, kind, kwargs) for kind in kinds]
        if share is None:
            tokens = torch.cat([kwargs[f"{kind}_places"] for kind in kinds])
            levels = [torch.cat(parts) for parts in zip(*features, strict=True)]
        else:
            tokens, levels = share.tokens, share.gather(features)
        tokens = tokens.to(embeds.device)
        merged, *deep = (level.to(embeds.device, embeds.dtype) for level in levels)
        layers = _hooked_layers(model)
        rest["inputs_embeds"] = embeds.index_copy(1, tokens, merged[None])
        rest[ADDED] = Placed(tokens, dict(zip(layers[1:], deep, strict=False)))
        return (), rest


def _features(model: Any, kind: str, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the features of images or videos: those for the input embeddings, then those for each deepstack layer."""
    tables = {name: kwargs[f"{kind}_{name}"] for name in TABLES if f"{kind}_{name}" in kwargs and not no_tables()}
    pixels = kwargs[KINDS[kind]].type(model.visual.dtype)
    output = model.visual(pixels, grid_thw=kwargs[f"{kind}_grid_thw"], return_dict=True, **tables)
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]


def _hooked_layers(model: Any) -> list[nn.Module]:
    """Return the current layers of the text model, each with its hook; adapters may have wrapped or added some."""
    layers = list(model.language_model.layers)
    for layer in layers:
        if MARK not in vars(layer):
            layer.register_forward_pre_hook(_add, with_kwargs=True)
            setattr(layer, MARK, True)
    return layers


def _add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a decoder layer: add its features to its input, and remove the argument that carries them."""
    if ADDED not in kwargs:
        return None
    placed: Placed = kwargs[ADDED]
    rest = {name: value for name, value in kwargs.items() if name != ADDED}
    features = placed.inputs.get(layer)
    if features is None:
        return args, rest
    placed.added.add(layer)
    name = "hidden_states"
    hidden = rest[name] if name in rest else args[0]
    tokens, features = placed.tokens.to(hidden.device), features.to(hidden.device, hidden.dtype)
    summed = hidden.index_copy(1, tokens, hidden.index_select(1, tokens) + features[None])
    return (args, rest | {name: summed}) if name in rest else ((summed, *args[1:]), rest)


def _require_added(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the text model: raise unless every layer has added its features."""
    if ADDED in kwargs and len(kwargs[ADDED].added) != len(kwargs[ADDED].inputs):
        raise AssertionError("features of images were not added to the layers that they belong to")


def _without_text_borders(visual: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the vision tower: remove arguments about the row's samples."""
    return args, {name: value for name, value in kwargs.items() if name not in TEXT_ONLY}


@cache
def differs(model_class: Any, config_class: Any) -> str:
    """Return the reason why the hooks do not work with a class of model; empty if they do.

    A model of a few hundred weights runs with and without the hooks, so any change of a release shows in the numbers.
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
                return f"does not build {model_class.__name__} from its config"
            plain, placed = _both_ways(model)
    except Exception as error:
        return f"fails on a tiny Qwen3-VL when the hooks are tried ({type(error).__name__}: {one_line(error, 80)})"
    if not torch.allclose(plain, placed, rtol=1e-4, atol=1e-5):
        return "computes different hidden states without the hooks"
    return ""


def _both_ways(model: Any) -> tuple[Tensor, Tensor]:
    """Return the hidden states of a row with an image, without and with the hooks."""
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
    """Return the config of the smallest model, dense or MoE, with three deepstack features if the class has them."""
    wide = 8
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
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
    kind = config_class.model_type
    if not kind.startswith("qwen3_vl"):
        del vision["deepstack_visual_indexes"]
    if kind.startswith("qwen2"):
        text |= {"bos_token_id": 1, "eos_token_id": 2}
        vision |= {"embed_dim": wide} if kind == "qwen2_vl" else {"fullatt_block_indexes": [1], "window_size": 8}
    if kind.startswith("qwen3_5"):
        heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 1}
        text |= heads | {
            "linear_key_head_dim": wide,
            "linear_value_head_dim": wide,
            "shared_expert_intermediate_size": wide,
        }
        rotary["partial_rotary_factor"] = 1.0
    return config_class(text_config=text, vision_config=vision, image_token_id=4, video_token_id=5)


def takes_keywords(function: Callable[..., Any]) -> str:
    """Return the reason why a model's forward cannot be called as it is here; empty if it can."""
    return takes(function, "input_ids", "inputs_embeds", "position_ids", "pixel_values", "image_grid_thw", ADDED)


def _zero3() -> str:
    """Return a reason not to build the small model while DeepSpeed would shard it; empty without ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    sharded = is_deepspeed_zero3_enabled()
    return "could not be checked, because DeepSpeed ZeRO-3 already shards new models" if sharded else ""


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
    name="media positions computed by dataloader workers",
    missing=_no_places,
    instead="the model finds the media tokens itself and waits for the device about a dozen times a step",
)
FEATURES = (PLACES,)
