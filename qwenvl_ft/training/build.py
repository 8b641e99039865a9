"""Builds the trainer of a recipe, its questions and its optional callbacks."""

from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from qwenvl_ft import assemble
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.evaluation.metrics import GEOMETRY, metric_of
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.activation_checkpointing import chosen_parts
from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.callbacks.lisa import LisaCallback
from qwenvl_ft.training.callbacks.stopping import PatienceCallback
from qwenvl_ft.training.matches_recipe import settings_of
from qwenvl_ft.training.trainer import QwenVLTrainer


def build_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: nn.Module,
    processor: Any,
    train_set: SampleDataset,
    eval_set: SampleDataset | dict[str, SampleDataset] | None = None,
    *,
    callbacks: list[TrainerCallback] | None = None,
    questions: Questions | None = None,
) -> QwenVLTrainer:
    """Return the trainer of a recipe, without the callback by which transformers prints logs.

    Args:
        args: from `prepare_run`.
        model: from `build_model`.
        callbacks: instead of the recipe's, see `build_callbacks`.
        questions: from `build_questions`, which is called if they are None; asked only if
            ``evaluation.run_during_training`` is true.

    Raises:
        RecipeError: the model is not prepared as the recipe says.
    """
    during = recipe.evaluation.run_during_training
    trainer = QwenVLTrainer(
        model,
        args,
        processor=processor,
        train_dataset=train_set,
        eval_dataset=eval_set,
        zero_gradient_steps=recipe.training.zero_gradient_steps,
        checkpointed=chosen_parts(recipe.training),
        recipe=recipe,
        questions=(questions or build_questions(recipe, train_set.encoder, int(args.seed))) if during else None,
        callbacks=build_callbacks(recipe, int(args.seed)) if callbacks is None else callbacks,
        **{name: value for name, (_, value) in settings_of(recipe).items()},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_questions(recipe: Recipe, encoder: Encoder, seed: int) -> Questions | None:
    """Return what is asked by generation during or after training, or None.

    Raises:
        RecipeError: there are no records to ask about, or an option of the metric is wrong.
        DataError: a record does not end with an answer that the metric can read.
    """
    section = recipe.evaluation
    metric = metric_of(section.metric)
    options = metric.checked(section.metric_options, "evaluation.metric_options")
    conversations = assemble.asked_conversations(recipe, encoder, seed)
    if conversations is None:
        return None
    if section.metric == GEOMETRY:
        options = assemble.coordinate_options(recipe, conversations) | options
    return Questions(section, conversations, options)


def build_callbacks(recipe: Recipe, seed: int) -> list[TrainerCallback]:
    """Return the callbacks behind ``training.early_stopping_patience`` and ``training.lisa_activated_layers``."""
    section = recipe.training
    callbacks: list[TrainerCallback] = []
    if section.early_stopping_patience is not None:
        callbacks.append(PatienceCallback(early_stopping_patience=section.early_stopping_patience))
    if section.lisa_activated_layers:
        callbacks.append(LisaCallback(section.lisa_activated_layers, section.lisa_step_interval, seed))
    return callbacks
