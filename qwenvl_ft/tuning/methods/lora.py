"""LoRA and its variants, by peft: low-rank updates on Linear layers, and modules trained in full beside them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.tuning.freeze import frozen_parts
from qwenvl_ft.tuning.targets import adapter_targets, saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)


def build_lora(model: nn.Module, tuner: TunerConfig, *, tied_copies: bool = False) -> nn.Module:
    """Wrap the model in a PeftModel (arXiv 2106.09685) whose only trained weights are LoRA's and full copies.

    Args:
        tied_copies: a full copy of an embedding that shares its weight with the language head is shared too; without
            it such a copy is refused.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,
        lora_dropout=tuner.lora_dropout,
        bias=tuner.lora_bias,
        use_rslora=tuner.use_rslora,
        use_dora=tuner.use_dora,
        task_type="CAUSAL_LM",
        ensure_weight_tying=tied_copies,
        **place(model, tuner, tied_copies=tied_copies),
    )
    if tuner.use_dora and not isinstance(config.target_modules, set | list):
        logger.warning("tuner.use_dora has nothing to act on: no layer gets an adapter, only modules_to_save train.")
    return wrap(model, config, tuner)


def place(model: Any, tuner: TunerConfig, *, tied_copies: bool = False) -> dict[str, Any]:
    """``target_modules`` and ``modules_to_save`` of a peft config, by full names.

    Raises:
        RecipeError: names that match nothing, and recipes that leave nothing to adapt or train.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    saved = saved_modules(model, tuner)
    embeddings = model.get_input_embeddings() if tied_copies else None
    _refuse_tied(model, [name for name in saved if model.get_submodule(name) is not embeddings])
    targets = adapter_targets(model, tuner)
    if not targets and not saved:
        raise RecipeError(
            f"tuner.train_type={tuner.train_type} leaves nothing to train: no Linear layer in an unfrozen part "
            f"(frozen: {', '.join(frozen_parts(tuner)) or 'none'}) and no tuner.modules_to_save. Unfreeze a part, "
            "e.g. tuner.freeze_llm=false."
        )
    # peft refuses an empty list of targets, but lets this name match nothing.
    return {"target_modules": targets or DUMMY_TARGET_MODULES, "modules_to_save": saved or None}


def wrap(model: nn.Module, config: Any, tuner: TunerConfig) -> nn.Module:
    """The PeftModel, with biases of frozen parts frozen again: ``lora_bias=all`` makes peft train every bias."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    peft_model: Any = get_peft_model(model, config)
    frozen = frozen_parts(tuner)
    for name, parameter in peft_model.named_parameters():
        if name.endswith("bias") and ".modules_to_save." not in name and part_of(name) in frozen:
            parameter.requires_grad_(False)
    base = peft_model.get_base_model()
    for name in config.modules_to_save or []:
        assert isinstance(base.get_submodule(name), ModulesToSaveWrapper), f"no copy of {name}"
    return peft_model


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
