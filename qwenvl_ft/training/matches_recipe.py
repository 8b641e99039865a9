"""Do model and trainer do what the recipe says? Asked by the trainer, for scripts that build it by themselves."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.values import shown
from qwenvl_ft.training.arguments import lora_plus
from qwenvl_ft.tuning.prepare import check_prepared, tuner_of
from qwenvl_ft.upstream.whole import full_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from qwenvl_ft.recipe.schema import Recipe, TunerConfig

CALLS = "Pass build_model(recipe, args, train_set) or prepare_model(model, recipe.tuner) to the trainer"
OWN = "for a model that you prepare in your own way, pass check_model=False"


def require_prepared(model: nn.Module, recipe: Recipe, args: TrainingArguments) -> None:
    """Raise unless `prepare_model` prepared the model by this recipe, and nothing has changed what trains since.

    An unprepared model would train all its weights, and be saved whole, whatever the recipe says.

    Raises:
        RecipeError: names the call that is missing, or the key in which the two differ.
    """
    tuner, asked = tuner_of(model), recipe.tuner
    if tuner is None:
        free = sum(full_size(value) for value in model.parameters() if value.requires_grad)
        raise RecipeError(
            f"the recipe says tuner.train_type={asked.train_type}, but the model was not prepared for it: {free:,} "
            f"weights would train. {CALLS}; {OWN}."
        )
    if key := _difference(tuner, asked):
        raise RecipeError(
            f"the model was prepared with tuner.{key}={shown(getattr(tuner, key))}, but the recipe says "
            f"{shown(getattr(asked, key))}. {CALLS}; {OWN}."
        )
    check_prepared(model, asked)
    if (args.bf16 or args.fp16) and args.deepspeed is None:
        _require_float32(model, keep_adapter=asked.lora_dtype is not None)


def settings_of(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Return the arguments of `QwenVLTrainer` that decide what is trained -> the recipe key of each, and its value."""
    section = recipe.training
    return {
        "max_length": ("template.max_length", recipe.template.max_length),
        "packing": ("training.packing", section.packing),
        "padding_free": ("training.padding_free", section.padding_free),
        "sequence_parallel_size": ("training.sequence_parallel_size", section.sequence_parallel_size),
        "vit_lr": ("training.vit_lr", section.vit_lr),
        "aligner_lr": ("training.aligner_lr", section.aligner_lr),
        "lorap_lr_ratio": ("training.lorap_lr_ratio", lora_plus(recipe)),
        "loss_weights": ("data.loss_weights", recipe.data.loss_weights),
        "z_loss": ("training.z_loss", section.z_loss),
    }


def require_settings(recipe: Recipe, given: dict[str, Any]) -> None:
    """Raise unless the trainer's arguments are the recipe's, which it would otherwise train without and save.

    Raises:
        RecipeError: names the key in which the two differ.
    """
    for name, (key, value) in settings_of(recipe).items():
        if (given[name] or None) != (value or None):
            raise RecipeError(
                f"the recipe says {key}={shown(value)}, but the trainer was given {name}={shown(given[name])}. Use "
                f"build_trainer(recipe, ...), which passes all settings, or pass {name}={value!r}."
            )


def _difference(tuner: TunerConfig, asked: TunerConfig) -> str | None:
    """Return the first key in which two tuner sections differ."""
    names = (entry.name for entry in fields(asked))
    return next((name for name in names if getattr(tuner, name) != getattr(asked, name)), None)


def _require_float32(model: nn.Module, *, keep_adapter: bool) -> None:
    """Raise RecipeError for a trainable 16-bit weight: updates below its last bit would be lost."""
    for name, value in model.named_parameters():
        short = value.requires_grad and value.dtype in (torch.bfloat16, torch.float16)
        if short and not (keep_adapter and ".lora_" in name):
            raise RecipeError(
                f"{name} would train in {str(value.dtype).removeprefix('torch.')}, where small updates are lost. "
                f"Call keep_float32(model) after prepare_model, or use build_model, which does; {OWN}."
            )
