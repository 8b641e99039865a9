"""LoRA and its variants, by peft: low-rank updates of Linear layers and experts, and modules trained in full."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.tuning.freeze import frozen_parts
from qwenvl_ft.tuning.methods.starts import check_sizes, start_of
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.stages import Earlier
from qwenvl_ft.tuning.targets import adapter_targets, parameter_targets, plain_start, saved_modules
from qwenvl_ft.upstream.peft import is_full_copy, lora_layers, no_target, pattern_of, without_bitsandbytes

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)


def build_lora(model: nn.Module, tuner: TunerConfig, *, batches: Any = None, tied_copies: bool = False) -> nn.Module:
    """Wrap the model in a PeftModel (arXiv 2106.09685) whose only trained weights are LoRA's and full copies.

    Args:
        batches: for a start that looks at data, see `starts`.
        tied_copies: a full copy of an embedding that shares its weight with the language head is shared too; without
            it such a copy is refused.
    """
    from peft import LoraConfig

    start = start_of(tuner, batches)
    if not plain_start(tuner):
        require_whole_weights(model, f"init_weights={tuner.init_weights}")
    where = lora_place(model, tuner, tied_copies=tied_copies)
    config = LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,
        # peft has no dropout for weights that are no layers, and one setting for all: `_set_dropout` puts it back.
        lora_dropout=0.0 if where["target_parameters"] else tuner.lora_dropout,
        bias=tuner.lora_bias,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        rank_pattern=dict(tuner.rank_pattern),
        alpha_pattern=dict(tuner.alpha_pattern),
        task_type="CAUSAL_LM",
        ensure_weight_tying=tied_copies,
        **start.settings(tuner),
        **where,
    )
    if tuner.use_dora and not isinstance(where["target_modules"], list):
        logger.warning("tuner.use_dora has nothing to act on: no layer gets an adapter, only modules_to_save train.")
    if tuner.lora_dropout and tuner.changes_base:
        logger.warning(
            "tuner.lora_dropout=%g with init_weights=%s drops parts of the base model itself, out of which the start "
            "is taken, so training begins with a larger loss. Set tuner.lora_dropout=0.",
            tuner.lora_dropout,
            tuner.init_weights,
        )
    start.prepare(model, config)
    wrapped = start.finish(wrap(model, config, tuner, start.kind))
    if tuner.lora_dtype is not None and start.kind is None:
        wrapped.hold_in(getattr(torch, tuner.lora_dtype))  # eva has made some anew
    if config.target_parameters:  # of this stage, or of an earlier one
        _set_dropout(wrapped, tuner.lora_dropout)
    return wrapped


def lora_place(model: nn.Module, tuner: TunerConfig, *, tied_copies: bool = False) -> dict[str, Any]:
    """Where LoRA goes, as `place` says; the model is looked at for names only.

    Raises:
        RecipeError: as `place`, an unknown start, or a pattern that no target's name ends with.
    """
    start_of(tuner, batches=["whatever"])
    where = place(model, tuner, tied_copies=tied_copies, parameters=True)
    targets = where["target_modules"] if isinstance(where["target_modules"], list) else []
    _check_patterns(tuner, [*targets, *(where["target_parameters"] or [])])
    check_sizes(tuner, {name: (_rank_of(tuner, name), _smaller_side(model.get_submodule(name))) for name in targets})
    return where


def place(model: Any, tuner: TunerConfig, *, tied_copies: bool = False, parameters: bool = False) -> dict[str, Any]:
    """``target_modules`` and ``modules_to_save`` of a peft config, by full names.

    Args:
        parameters: the method reaches weights outside of Linear layers too, so ``target_parameters`` is answered.

    Raises:
        RecipeError: names that match nothing, and recipes that leave nothing to adapt or train.
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
    # peft refuses an empty list of targets, but lets this name match nothing.
    told = {"target_modules": targets or no_target(), "modules_to_save": saved or None}
    return told | ({"target_parameters": weights or None} if parameters else {})


def wrap(model: nn.Module, config: Any, tuner: TunerConfig, kind: Any = None) -> nn.Module:
    """The PeftModel, with biases of frozen parts frozen again: ``lora_bias=all`` makes peft train every bias.

    Args:
        kind: the class of the PeftModel, a `TrainedPeftModel`; None is peft's own, except for ``lora_dtype``.
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


def require_whole_weights(model: nn.Module, key: str) -> None:
    """Refuse weights that ZeRO-3 has cut among the processes, for what computes with whole ones.

    Args:
        key: the setting of ``tuner`` that does, for the error.

    Raises:
        RecipeError: they are cut.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RecipeError(f"tuner.{key} needs whole weights, and ZeRO-3 has cut them. Shard less: zero2, or none.")


def _check_patterns(tuner: TunerConfig, targets: list[str]) -> None:
    """Refuse a pattern that no target's name ends with; peft passes over it."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(tuner, key):
            if not any(pattern_of([pattern], target) == pattern for target in targets):
                example = targets[0] if targets else "none is left"
                raise RecipeError(
                    f"tuner.{key} names {pattern!r}, which no adapted layer's name ends with. A target: {example}."
                )


def _rank_of(tuner: TunerConfig, target: str) -> int:
    key = pattern_of(tuner.rank_pattern, target)
    return tuner.rank_pattern.get(key, tuner.lora_rank)


def _smaller_side(module: Any) -> int:
    weight = getattr(module, "weight", None)
    return min(weight.shape) if weight is not None else 0


def _set_dropout(model: Any, share: float) -> None:
    """Dropout before the adapters of Linear layers, where peft was told none."""
    from torch import nn

    for _, module in lora_layers(model) if share else ():
        for name in module.lora_dropout:
            module.lora_dropout[name] = nn.Dropout(p=share)


def _refuse_tied(model: Any, saved: list[str]) -> None:
    """A full copy of one of two tied layers would drift from the other, and a merged checkpoint could not say so."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    for name in saved:
        held = set(model.get_submodule(name).modules())
        if (head in held) != (embeddings in held):
            raise RecipeError(
                f"tuner.modules_to_save names {name!r}, whose weight this model shares between embedding and language "
                "head; a copy of one would drift from the other. Leave it out, or use tuner.train_type=full."
            )
