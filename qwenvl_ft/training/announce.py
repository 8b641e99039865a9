"""Prints the model, data and plan of a run before its first step, and saves the recipe to run it again."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
import transformers
from torch import nn

from qwenvl_ft.checkpoint.complete import Resume
from qwenvl_ft.checkpoint.same_run import processes_of
from qwenvl_ft.data.media.patches import obstacle
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.data_gate import offer
from qwenvl_ft.training.loaders import datasets_in
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.freeze_flags import freeze_flags_of, frozen_parts
from qwenvl_ft.tuning.prepare import trainable_table
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.proven import unproven_line

IMBALANCE = 0.03
"""Share by which the work of a step's slowest rank must exceed the mean to be reported."""


def announce(trainer: QwenVLTrainer, run_log: RunLog, start: Resume, *, removed: Iterable[Path] = ()) -> None:
    """On rank 0, save ``recipe.yaml`` in the output directory and print one line for each fact about the run.

    Args:
        start: the checkpoint that the run continues from, if any, and those that it passes over.
        removed: partial checkpoints that were removed.
    """
    if not trainer.is_world_process_zero():
        return
    run_log.follow(trainer.args)
    if trainer.recipe is not None:
        trainer.recipe.save(Path(str(trainer.args.output_dir)) / "recipe.yaml")
    for line in _lines(trainer):
        run_log.write(line)
    for line in (*(f"removed {folder}, which was not saved completely" for folder in removed), *start.lines()):
        run_log.write(line)
    if start.folder is not None and (line := _other_draws(trainer, start.folder)):
        run_log.write(line)


def _other_draws(trainer: QwenVLTrainer, checkpoint: Path) -> str:
    """Return a line if a run resumed with another number of processes, or of those that share a row, draws other random
    numbers; else nothing."""
    training = saved_recipe(checkpoint).get("training") or {}
    sharing = training.get("sequence_parallel_size", 1) if training else trainer.sequence_parallel_size
    before = _processes(processes_of(checkpoint), sharing)
    now = _processes(trainer.args.world_size, trainer.sequence_parallel_size)
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in cast(nn.Module, trainer.model).modules())
    names = [name for name, used in (("dropout", drops), ("NEFTune", trainer.noise is not None)) if used]
    if before == now or not names:
        return ""
    return (
        f"saved by {before} and resumed by {now}: {' and '.join(names)} will draw other numbers than in an "
        "uninterrupted run"
    )


def _processes(number: int, sharing: int) -> str:
    return f"{number} processes" + (f", {sharing} to a row" if sharing > 1 else "")


def _lines(trainer: QwenVLTrainer) -> Iterator[str]:
    args, recipe, model = trainer.args, trainer.recipe, cast(nn.Module, trainer.model)
    if recipe is not None and recipe.phase:
        yield f"starts from {recipe.tuner.resume_from_checkpoint or recipe.model.model}"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    yield f"{type(model).__name__}, {versions}, {args.device}, processes: {args.world_size}"
    yield from filter(None, (unproven_line(), *fallbacks()))
    if reason := obstacle(trainer.processor.image_processor):
        yield f"images are normalised in the dataloader workers, which sends eight times the bytes: {reason}"
    if trainer.fused is not None:
        yield str(trainer.fused)
    if args.torch_compile:
        yield f"the language model's layers are compiled by {args.torch_compile_backend} in the first steps"
    own_rates = {"llm": None, "vision": trainer.vit_lr, "merger": trainer.aligner_lr}
    rates = {part: args.learning_rate if rate is None else rate for part, rate in own_rates.items()}
    yield from trainable_table(model, rates).splitlines()
    if recipe is not None and recipe.tuner.train_type == "full" and (frozen := frozen_parts(recipe.tuner)):
        yield f"full training leaves {' and '.join(frozen)} frozen; to train all: {freeze_flags_of(frozen)}"
    for dataset in datasets_in(trainer.train_dataset, trainer.eval_dataset):
        yield dataset.summary()
        yield from dataset.remarks()
    if recipe is not None and (line := offer(recipe, trainer.samples)):
        yield line
    sampler = trainer.plan_sampler(trainer.samples)
    if trainer.packing:
        yield f"packing: {len(sampler.rows(sampler.epoch)):,} rows of {trainer.max_length:,}, {sampler.fill():.1%} full"
    imbalance = sampler.waiting() if sampler.shape.data_ranks > 1 else 0.0
    if imbalance > IMBALANCE:
        advice = "" if sampler.grouped else "; training.train_sampling_strategy=group_by_length groups similar rows"
        yield f"the slowest rank of a step has {imbalance:.0%} more work than the mean{advice}"
