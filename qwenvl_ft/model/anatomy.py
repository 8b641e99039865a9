"""Maps names of modules and parameters to the parts of a Qwen-VL model: vision tower, merger (aligner), language model.

Names are those of transformers 5 (``model.visual.merger.linear_fc1.weight``). Prefixes that wrappers add are ignored:
``base_model.model.`` and ``modules_to_save.default.`` of PEFT, ``module.`` of DDP and DeepSpeed, ``_orig_mod.`` of
torch.compile, ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenvl_ft.errors import CheckpointError, RecipeError, hint

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

PARTS = {
    "vision": r"(^|\.)visual\.(?!(merger|deepstack_merger_list)(\.|$))|(^|\.)visual$",
    "merger": r"(^|\.)visual\.(merger|deepstack_merger_list)(\.|$)",
    "llm": r"(^|\.)(language_model|lm_head)(\.|$)",
}
"""Part -> regex to search in a name without wrapper prefixes. At most one matches."""

FREEZE_FLAGS = {"vision": "freeze_vit", "merger": "freeze_aligner", "llm": "freeze_llm"}
"""Part -> key of the recipe's ``tuner`` section that freezes it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module names of one model family."""

    mergers: tuple[str, ...] = ("model.visual.merger",)
    experts: bool = False
    patch_embed: str = "model.visual.patch_embed"
    vision_blocks: str = "model.visual.blocks"
    text_layers: str = "model.language_model.layers"
    embeddings: str = "model.language_model.embed_tokens"
    head: str = "lm_head"
    released_names: tuple[tuple[str, str], ...] = ()
    """Regex and replacement that turn this package's names into those of the released checkpoints."""
    released_before_5: bool = True
    """The released checkpoints have experts and config.json as transformers 4.57 wrote them, not as 5 does."""


_OLDER = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
_DEEPSTACK = ("model.visual.merger", "model.visual.deepstack_merger_list")

FAMILIES = {
    "qwen3_vl": Family(mergers=_DEEPSTACK),
    "qwen3_vl_moe": Family(mergers=_DEEPSTACK, experts=True),
    "qwen3_5": Family(released_before_5=False),
    "qwen3_5_moe": Family(experts=True, released_before_5=False),
    "qwen2_5_vl": Family(released_names=_OLDER),
    "qwen2_vl": Family(released_names=_OLDER),
}
"""``model_type`` of config.json -> its module names."""

ALIASES = {
    "qwen3moevl": "qwen3_vl_moe",
    "qwen35vl": "qwen3_5",
    "qwen36": "qwen3_5",
    "qwen36moe": "qwen3_5_moe",
    "qwen38": "qwen3_5",
    "qwen38moe": "qwen3_5_moe",
}
"""Other tools' spellings of a model type, reduced to letters and digits -> ``model_type``."""

_LEADING = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
_INNER = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|original_module|base_layer"
    r"|modules_to_save\.[^.]+)(?:\.|$)"
)
_TEXT = r"(?=(layers|embed_tokens|norm|rotary_emb)(\.|$))"
_OLD_NAMES = (
    (re.compile(r"^visual(?=\.|$)"), "model.visual"),
    (re.compile(rf"^(?:model\.)?language_model\.(?:model\.)?{_TEXT}"), "model.language_model."),
    (re.compile(rf"^model\.{_TEXT}"), "model.language_model."),
    (re.compile(r"^language_model\.lm_head"), "lm_head"),
)


def family_of(model_type: str) -> Family:
    """Return the module names of a ``model_type``, spelt as in config.json.

    Raises:
        CheckpointError: the type is not one of ``FAMILIES``.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(f"model type {model_type!r} is not supported.{hint(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the kind of each decoder layer, as transformers names it; empty if the config does not tell them apart."""
    return tuple(getattr(config.get_text_config(), "layer_types", None) or ())


def canonical_model_type(name: str) -> str:
    """Return the key of ``FAMILIES`` for a user's spelling (``qwen_3-vl``, ``Qwen2.5-VL``).

    Raises:
        RecipeError: an unknown model type.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    spellings = {re.sub(r"[^a-z0-9]", "", key): key for key in FAMILIES} | ALIASES
    if plain not in spellings:
        raise RecipeError(f"unknown model.model_type {name!r}.{hint(name, FAMILIES)}")
    return spellings[plain]


def canonical_name(name: str) -> str:
    """Strip from a parameter's or module's name what wrappers have added.

    Example:
        ``base_model.model.model.visual.merger.modules_to_save.default.norm.bias`` ->
        ``model.visual.merger.norm.bias``. LoRA's ``lora_A.default.weight`` is kept.
    """
    return _INNER.sub("", _LEADING.sub("", name)).rstrip(".")


def current_name(name: str) -> str:
    """Translate a name from older checkpoints and guides to transformers 5.

    Example:
        ``model.layers.0.mlp`` -> ``model.language_model.layers.0.mlp``; ``visual.merger`` -> ``model.visual.merger``.
    """
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name, count=1)
    return name


def part_of(name: str) -> str:
    """Return the part that a parameter or module belongs to, with or without wrapper prefixes.

    Raises:
        CheckpointError: the name belongs to no part, so the model is not one of ``FAMILIES``.
    """
    canonical = canonical_name(name)
    for part, pattern in PARTS.items():
        if re.search(pattern, canonical):
            return part
    raise CheckpointError(
        f"{name!r} belongs to none of the parts {', '.join(PARTS)}. Supported models: {', '.join(FAMILIES)}."
    )


def part_modules(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return the largest modules that lie completely in one part, as part -> module name -> module.

    Example:
        Qwen3-VL: ``merger`` -> ``model.visual.merger`` and ``model.visual.deepstack_merger_list``; ``llm`` ->
        ``model.language_model`` and ``lm_head``; ``vision`` -> patch_embed, pos_embed, blocks of ``model.visual``.
    """
    found: dict[str, dict[str, nn.Module]] = {part: {} for part in PARTS}
    for name, module, part in _largest("", model):
        found[part][name] = module
    return found


def _largest(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    prefix = f"{name}." if name else ""
    parts = {part_of(prefix + key) for key, _ in module.named_parameters(remove_duplicate=False)}
    if len(parts) == 1:
        yield name, module, parts.pop()
    elif parts:
        for key, child in module.named_children():
            yield from _largest(prefix + key, child)
