"""A curriculum: the phases of a recipe one after the other, each from the weights of the one before.

A phase is a run of its own, in ``output_dir/phase_N_NAME``: with its data, plan, optimizer and schedule, its
checkpoints, and a recipe that trains it again. What is ours here is what lies between: all phases are tried before the
first begins, finished ones are not trained again, and the last one's model stands in ``output_dir``.
"""

import gc
import os
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qwenvl_ft import assemble
from qwenvl_ft.checkpoint.complete import AUTO, finished, resolve_resume
from qwenvl_ft.errors import CheckpointError, QwenVLError, RecipeError
from qwenvl_ft.recipe.schema import Recipe, TunerConfig
from qwenvl_ft.training.callbacks.progress import ProgressCallback
from qwenvl_ft.training.gate import check_before_training
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.upstream.processes import forget_precision

NOT_PUBLISHED = ("checkpoint-*", "runs", "recipe.yaml")
"""What a phase's folder has that is of the phase alone."""


def open_phases(recipe: Recipe) -> list[Any]:
    """The recipes that are still to be run, in their order.

    Everything of them that can be known is tried: arguments, model, devices, data, lengths and questions. Only then the
    recipe is written into ``output_dir``.

    Raises:
        QwenVLError: the phase, and what is wrong with it.
    """
    runs = chain(recipe)
    todo = [run for run in runs if not _is_finished(run)]
    first_process = True
    for phase, run in zip(recipe.phases, runs, strict=True):
        if run not in todo:
            continue
        try:
            resolve_resume(run.training.resume_from_checkpoint, folder_of(run))
            args = prepare_run(phase)
            first_process = args.process_index == 0
            check_before_training(phase)
            train_set, _ = assemble.build_datasets(phase, assemble.build_processor(phase), args.seed)
            assemble.build_questions(phase, train_set.encoder, args.seed)
        except QwenVLError as error:
            raise type(error)(f"phase {phase.phase}: {error}") from error
        finally:
            unset_hf_deepspeed_config()  # it would shard the models of later phases while they are only tried
    if first_process:
        _tell(recipe, runs, todo)
    return todo


def chain(recipe: Recipe) -> list[Any]:
    """The phases' recipes, each with the result of the one before as its start, and saved for the one after.

    Raises:
        RecipeError: a phase cannot go on from the one before.
    """
    runs: list[Any] = []
    for phase in recipe.phases:
        run = deepcopy(phase)
        if runs:
            _go_on(run, runs[-1])
            runs[-1].training.save_final = True
        runs.append(run)
    return runs


def folder_of(run: Any) -> Path:
    return Path(run.training.arguments["output_dir"])


def between() -> None:
    """Wait for all processes, and let go of what the last phase held: memory, precision, trackers."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forget_precision()
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()  # the next phase's steps begin at 0 again


def publish(recipe: Recipe) -> None:
    """Let the last phase's model stand in ``output_dir`` too, without taking its space twice where links are had."""
    between()
    first_process = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if not (first_process and recipe.training.save_final):
        return
    last = folder_of(recipe.phases[-1])
    ignored = shutil.ignore_patterns(*NOT_PUBLISHED)
    shutil.copytree(last, last.parent, copy_function=_link, ignore=ignored, dirs_exist_ok=True)


def _go_on(run: Any, before: Any) -> None:
    """Make the result of ``before`` the start of ``run``."""
    earlier, method = before.tuner.train_type, run.tuner.train_type
    if METHODS[earlier].adapter:
        if method != earlier:
            raise RecipeError(
                f"phase {run.phase}: tuner.train_type={method} cannot go on from the adapter of tuner.train_type="
                f"{earlier}. Keep one type; or end here, merge (qwenvl-ft merge) and start another run."
            )
        run.model.model, run.model.model_revision = before.model.model, before.model.model_revision
        run.tuner.resume_from_checkpoint = str(folder_of(before))
        run.tuner.init_weights = TunerConfig().init_weights  # the adapter is there
        return
    if method == earlier == "llamapro":
        raise RecipeError(
            f"phase {run.phase}: tuner.train_type=llamapro would add its blocks once more. Set tuner.train_type=full "
            "there, which trains all of the longer model, or what tuner.trainable_parameters names."
        )
    run.model.model, run.model.model_revision = str(folder_of(before)), "main"
    run.tuner.resume_from_checkpoint = None


def _is_finished(run: Any) -> bool:
    """Whether a phase was trained to its end, by a run that this one goes on from.

    Raises:
        RecipeError: ``training.resume_from_checkpoint`` names one checkpoint.
        CheckpointError: this is a fresh start into the folder of an earlier run.
    """
    resume, folder = run.training.resume_from_checkpoint, folder_of(run)
    goes_on = resume is True or str(resume).lower() in AUTO
    if not goes_on and resume not in (None, False) and str(resume).lower() not in ("false", "none", ""):
        raise RecipeError(
            f"training.resume_from_checkpoint={resume}: of a recipe with phases, true finds the phase and the "
            "checkpoint to go on from."
        )
    if finished(folder) and not goes_on:
        raise CheckpointError(
            f"training.output_dir={folder.parent} holds {folder.name} of an earlier run. Go on from it with "
            "training.resume_from_checkpoint=true, or give another folder."
        )
    return finished(folder)


def _tell(recipe: Recipe, runs: list[Any], todo: list[Any]) -> None:
    """Save the recipe, and say which phases there are."""
    progress = ProgressCallback()
    progress.folder = folder_of(recipe)
    progress.folder.mkdir(parents=True, exist_ok=True)
    recipe.save(progress.folder / "recipe.yaml")
    for run in runs:
        progress.say(f"phase {run.phase}: {folder_of(run)}" + ("" if run in todo else ", finished before"))


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
