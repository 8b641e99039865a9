"""Train type ``lora`` and its variants, by peft: low-rank updates of Linear layers and experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.tuning.freeze_flags import frozen_parts
from qwenvl_ft.tuning.methods.starts import check_sizes, start_of
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.stages import Earlier
from qwenvl_ft.tuning.targets import adapter_targets, parameter_targets, plain_start, saved_modules
from qwenvl_ft.upstream.peft import (
    gather_as_one,
    is_full_copy,
    lora_layers,
    no_target,
    pattern_of,
    without_bitsandbytes,
)
from qwenvl_ft.upstream.whole import full_shape, is_partitioned, require_whole_weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)


def build_lora(
    model: PreTrainedModel, tuner: TunerConfig, *, batches: Sequence[Any] | None = None, tied_copies: bool = False
) -> nn.Module:
    """Wrap the model in a PeftModel (arXiv 2106.09685) whose only trainable weights are LoRA's and ``modules_to_save``.

    Args:
        batches: batches of the collator, for an initialisation that is computed from data, see `starts`.
        tied_copies: if ``modules_to_save`` has an embedding that shares its weight with the language head, let the
            head share the copy; otherwise that is an error.

    Raises:
        RecipeError: see `lora_place`.
    """
    from peft import LoraConfig

    start = start_of(tuner, batches)
    if not plain_start(tuner):
        require_whole_weights(model, f"init_weights={tuner.init_weights}")
    targets = lora_place(model, tuner, tied_copies=tied_copies)
    config = LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,
        # peft supports no dropout for target_parameters, and has one setting for all: `_set_dropout` sets the others.
        lora_dropout=0.0 if targets["target_parameters"] else tuner.lora_dropout,
        bias=tuner.lora_bias,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        rank_pattern=dict(tuner.rank_pattern),
        alpha_pattern=dict(tuner.alpha_pattern),
        task_type="CAUSAL_LM",
        ensure_weight_tying=tied_copies,
        **start.settings(tuner),
        **targets,
    )
    if tuner.use_dora and not isinstance(targets["target_modules"], list):
        logger.warning("tuner.use_dora has no effect: no layer gets an adapter, only modules_to_save train.")
    if tuner.lora_dropout and tuner.changes_base:
        logger.warning(
            "tuner.lora_dropout=%g with init_weights=%s drops parts of the base model itself, which this "
            "initialisation moves into LoRA, so training begins with a larger loss. Set tuner.lora_dropout=0.",
            tuner.lora_dropout,
            tuner.init_weights,
        )
    start.prepare(model, config)
    wrapped = start.finish(wrap(model, config, tuner, start.kind))
    if tuner.lora_dtype is not None and start.kind is None:
        wrapped.hold_in(getattr(torch, tuner.lora_dtype))  # eva has replaced some weights
    if config.target_parameters:  # of this stage, or of an earlier one
        _set_dropout(wrapped, tuner.lora_dropout)
    return wrapped


def lora_place(model: PreTrainedModel, tuner: TunerConfig, *, tied_copies: bool = False) -> dict[str, Any]:
    """Return LoRA's targets, see `place`. Only names and sizes of the model are read, so it may be on the meta device.

    Raises:
        RecipeError: as `place`; also an unknown ``init_weights``, a rank that is too large for it, or a pattern that
            no target's name ends with.
    """
    start_of(tuner, batches=["any"])  # checks init_weights; the batches themselves are not read
    fields = place(model, tuner, tied_copies=tied_copies, parameters=True)
    modules = fields["target_modules"] if isinstance(fields["target_modules"], list) else []
    _check_patterns(tuner, [*modules, *(fields["target_parameters"] or [])])
    check_sizes(tuner, {name: (_rank_of(tuner, name), _smaller_side(model.get_submodule(name))) for name in modules})
    return fields


def place(
    model: PreTrainedModel, tuner: TunerConfig, *, tied_copies: bool = False, parameters: bool = False
) -> dict[str, Any]:
    """Return ``target_modules`` and ``modules_to_save`` of a peft config, as full names.

    Args:
        tied_copies: see `build_lora`.
        parameters: also return ``target_parameters``, for a method that adapts weights outside of Linear layers.

    Raises:
        RecipeError: names that match nothing, or nothing to adapt or train.
    """
    saved = saved_modules(model, tuner)
    embeddings = model.get_input_embeddings() if tied_copies else None
    _refuse_tied(model, [name for name in saved if model.get_submodule(name) is not embeddings])
    weights = parameter_targets(model, tuner) if parameters else []
    targets = adapter_targets(model, tuner)
    if not targets and not saved and not weights and not tuner.resume_from_checkpoint:
        raise RecipeError(
            f"tuner.train_type={tuner.train_type} leaves nothing to train: no Linear layer in an unfrozen part "
            f"(frozen: {', '.join(frozen_parts(tuner)) or 'none'}) and no tuner.modules_to_save. Unfreeze a part, "
            "e.g. tuner.freeze_llm=false."
        )
    # peft rejects an empty list of targets, but accepts this name that matches nothing.
    fields = {"target_modules": targets or no_target(), "modules_to_save": saved or None}
    return fields | ({"target_parameters": weights or None} if parameters else {})


def wrap(model: nn.Module, config: Any, tuner: TunerConfig, kind: type[TrainedPeftModel] | None = None) -> nn.Module:
    """Wrap the model in a PeftModel, and freeze the biases of frozen parts again: ``lora_bias=all`` unfreezes them.

    Args:
        config: peft's config of the method.
        kind: class of the PeftModel; None is peft's own, or `TrainedPeftModel` if ``lora_dtype`` is set.
    """
    from peft import get_peft_model

    earlier = Earlier.of(tuner)
    if earlier is not None:
        earlier.widen(config, model)
    if tuner.lora_dtype is not None:
        kind = kind or TrainedPeftModel
    with without_bitsandbytes():
        if kind is None:
            peft_model: Any = get_peft_model(model, config)
        else:
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
            peft_model = kind(model, config)
    if getattr(config, "target_parameters", None) and any(map(is_partitioned, model.parameters())):
        gather_as_one(peft_model)
    frozen = frozen_parts(tuner)
    for name, parameter in peft_model.named_parameters():
        if name.endswith("bias") and ".modules_to_save." not in name and part_of(name) in frozen:
            parameter.requires_grad_(False)
    base = peft_model.get_base_model()
    for name in config.modules_to_save or []:
        assert is_full_copy(base.get_submodule(name)), f"no copy of {name}"
    if tuner.lora_dtype is not None:
        peft_model.hold_in(getattr(torch, tuner.lora_dtype))
    return peft_model


def wrap_own(
    model: nn.Module, config_type: Callable[..., Any], tuner: TunerConfig, targets: list[str], **settings: Any
) -> nn.Module:
    """Wrap the model with an adapter type of this package: at ``targets``, beside ``modules_to_save`` in full.

    Args:
        config_type: its peft config.
        targets: full names of the modules that get an adapter.
        settings: the other fields of the config.
    """
    config = config_type(
        task_type="CAUSAL_LM",
        target_modules=targets,
        modules_to_save=saved_modules(model, tuner) or None,
        **settings,
    )
    return wrap(model, config, tuner)


def _check_patterns(tuner: TunerConfig, targets: list[str]) -> None:
    """Raise RecipeError for a pattern that no target's name ends with; peft would ignore it."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(tuner, key):
            if not any(pattern_of([pattern], target) == pattern for target in targets):
                example = targets[0] if targets else "there is none"
                raise RecipeError(
                    f"tuner.{key} names {pattern!r}, but no adapted layer's name ends with it. A target: {example}."
                )


def _rank_of(tuner: TunerConfig, target: str) -> int:
    key = pattern_of(tuner.rank_pattern, target)
    return tuner.rank_pattern.get(key, tuner.lora_rank)


def _smaller_side(module: Any) -> int:
    weight = getattr(module, "weight", None)
    return min(full_shape(weight)) if weight is not None else 0


def _set_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout of Linear layers' adapters, where the peft config has none."""
    from torch import nn

    for _, module in lora_layers(model) if share else ():
        for name in module.lora_dropout:
            module.lora_dropout[name] = nn.Dropout(p=share)


def _refuse_tied(model: PreTrainedModel, saved: list[str]) -> None:
    """Raise RecipeError if only one of two tied layers is copied: the copies would diverge, also in a merged model."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    for name in saved:
        held = set(model.get_submodule(name).modules())
        if (head in held) != (embeddings in held):
            raise RecipeError(
                f"tuner.modules_to_save names {name!r}, whose weight this model shares between embedding and language "
                "head; a copy of one would diverge from the other. Leave it out, or use tuner.train_type=full."
            )
