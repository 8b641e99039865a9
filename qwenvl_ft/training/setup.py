"""A recipe's sections -> the objects of a run, and what is said and saved before and after it."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from qwenvl_ft.data.media.patches import obstacle
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.arguments import lora_plus
from qwenvl_ft.training.callbacks.lisa import LisaCallback
from qwenvl_ft.training.callbacks.stopping import PatienceCallback
from qwenvl_ft.training.checkpointing import chosen_parts
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.prepare import trainable_table
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.proven import unproven_line

logger = logging.getLogger(__name__)

WAITING = 0.03
"""More work than this, over the mean, of a step's costliest rank is told of."""


def build_trainer(
    recipe: Recipe, args: TrainingArguments, model: nn.Module, processor: Any, train_set: SampleDataset, **more: Any
) -> QwenVLTrainer:
    """The trainer of a recipe, without transformers' own console.

    Args:
        more: ``eval_dataset`` and ``callbacks``.
    """
    trainer = QwenVLTrainer(
        model,
        args,
        processor=processor,
        train_dataset=train_set,
        max_length=recipe.template.max_length,
        packing=recipe.training.packing,
        padding_free=recipe.training.padding_free,
        vit_lr=recipe.training.vit_lr,
        aligner_lr=recipe.training.aligner_lr,
        lorap_lr_ratio=lora_plus(recipe),
        loss_weights=recipe.data.loss_weights,
        zero_gradient_steps=recipe.training.zero_gradient_steps,
        z_loss=recipe.training.z_loss,
        checkpointed=chosen_parts(recipe.training),
        recipe=recipe,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def callbacks(recipe: Recipe, seed: int) -> list[Any]:
    """The callbacks behind ``training.early_stopping_patience`` and ``training.lisa_activated_layers``."""
    told = recipe.training
    made: list[Any] = []
    if told.early_stopping_patience is not None:
        made.append(PatienceCallback(early_stopping_patience=told.early_stopping_patience))
    if told.lisa_activated_layers:
        made.append(LisaCallback(told.lisa_activated_layers, told.lisa_step_interval, seed))
    return made


def tell(trainer: Any, progress: Any, resume: Path | None) -> None:
    """What is about to be trained, on what, from where: printed before the first step, and saved to be run again."""
    if not trainer.is_world_process_zero():
        return
    progress.follow(trainer.args)
    trainer.recipe.save(Path(trainer.args.output_dir) / "recipe.yaml")
    sampler = trainer.plan_sampler(trainer.train_dataset)
    args = trainer.args
    say = progress.say
    if trainer.recipe.phase:
        say(f"goes on from {trainer.recipe.tuner.resume_from_checkpoint or trainer.recipe.model.model}")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    say(f"{type(trainer.model).__name__}, {versions}, {args.device}, processes: {args.world_size}")
    for line in filter(None, (unproven_line(), *fallbacks())):
        say(line)
    if reason := obstacle(trainer.processing_class.image_processor):
        say(f"images are normalised in the loader's workers, at eight times the bytes: {reason}")
    if trainer.fused is not None:
        say(str(trainer.fused))
    if args.torch_compile:
        say(f"the language model's layers are compiled by {args.torch_compile_backend} in the first steps")
    rates = {"llm": args.learning_rate, "vision": trainer.vit_lr, "merger": trainer.aligner_lr}
    rates = {part: args.learning_rate if rate is None else rate for part, rate in rates.items()}
    for line in trainable_table(trainer.model, rates).splitlines():
        say(line)
    evaluated = trainer.eval_dataset
    sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    for dataset in filter(None, (trainer.train_dataset, *sets)):
        say(dataset.summary())
    if trainer.packing:
        say(f"packing: {len(sampler.rows(0)):,} rows of {trainer.max_length:,}, {sampler.fill():.1%} full")
    waiting = sampler.waiting() if args.world_size > 1 else 0.0
    if waiting > WAITING:
        more = "" if sampler.grouped else "; training.train_sampling_strategy=group_by_length lets like rows meet"
        say(f"the costliest rank of a step has {waiting:.0%} more to do than the mean{more}")
    if resume is not None:
        say(f"going on from {resume}")


def finish(trainer: Any, told: Any, questions: Any, progress: Any) -> dict[str, float]:
    """Save the trained model, unless told not to, and the run's state; ask the model the questions if there are any."""
    if trainer.recipe.training.save_final:
        trainer.save_model()
    trainer.save_state()
    if questions is None:
        return {}
    from qwenvl_ft.evaluation.generate import evaluate

    result = evaluate(
        trainer.accelerator.unwrap_model(trainer.model_wrapped),
        trainer.processing_class,
        questions,
        metric=told.metric,
        encoder=trainer.train_dataset.encoder,
        batch_size=told.batch_size,
        max_new_tokens=told.max_new_tokens,
    )
    if trainer.is_world_process_zero():
        name = told.metric.replace("_", " ")
        progress.say(f"{name} {result[told.metric]:.2%} of {result['count']} by generation, {result['seconds']:.1f} s")
    return {told.metric: result[told.metric], f"{told.metric}_count": result["count"]}
