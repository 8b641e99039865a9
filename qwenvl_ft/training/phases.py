"""Runs a curriculum: the phases of a recipe in order, each starting from the weights of the one before.

A phase is a run of its own in ``output_dir/phase_N_NAME``, with its data, plan, optimizer, schedule and checkpoints,
and a recipe that trains it again. This module does the rest: it checks all phases before the first one begins, skips
finished ones, and puts the last one's model into ``output_dir``.
"""

import os
import shutil
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import torch

from qwenvl_ft import assemble
from qwenvl_ft.checkpoint.complete import AUTO, finished, is_fresh, resolve_resume
from qwenvl_ft.checkpoint.manifest import MANIFEST, are_joined, content_fault, rank
from qwenvl_ft.checkpoint.restart import resume_setting
from qwenvl_ft.checkpoint.weights_only import KEY as WEIGHTS_ONLY
from qwenvl_ft.checkpoint.weights_only import start_from
from qwenvl_ft.errors import CheckpointError, QwenVLError, RecipeError
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.agreement import Agreement, only_run_of
from qwenvl_ft.training.build import build_questions
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.data_gate import check_before_training
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.training.process_state import restored_process
from qwenvl_ft.training.run_length import require_enough_steps
from qwenvl_ft.training.sealed import sealed_result
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.upstream.processes import forget_precision

NOT_PUBLISHED = ("checkpoint-*", "runs", "recipe.yaml", MANIFEST)
"""Entries of the last phase's folder that are not copied to ``output_dir``."""


def open_phases(recipe: Recipe, held: ExitStack) -> list[Recipe]:
    """Return the recipes of the phases that are not finished, in order.

    Their arguments, models, devices, data, lengths and questions are checked first. Only then is the recipe written
    into ``output_dir``.

    Args:
        held: takes the lock on ``output_dir``, once the ranks are joined.

    Raises:
        QwenVLError: names the phase and what is wrong with it.
    """
    runs = chain(recipe)
    last = next((number for number in reversed(range(len(runs))) if _is_finished(runs[number])), -1)
    pending = runs[last + 1 :]  # what came before the last finished phase may be deleted
    on_rank_0 = not _is_idle()
    for phase, run in zip(recipe.phases, runs, strict=True):
        if run not in pending:
            continue
        try:
            with restored_process():  # e.g. DeepSpeed's settings would shard the models of later phases
                on_rank_0 = _check(phase, run, None if run is not pending[0] else held)
        except QwenVLError as error:
            raise type(error)(f"phase {phase.phase}: {error}") from error
    if on_rank_0:
        _announce(recipe, runs, pending)
    return pending


def _check(phase: Recipe, run: Recipe, held: ExitStack | None) -> bool:
    """Check one phase; return True on rank 0.

    Args:
        held: takes the lock on the folder of all phases; None if it has it.
    """
    resolve_resume(resume_setting(run.training.resume_from_checkpoint), folder_of(run))
    args = prepare_run(phase)
    if held is not None:
        held.enter_context(only_run_of(Agreement.of(args), folder_of(run).parent, on_rank_0=args.process_index == 0))
    check_before_training(phase)
    train_set, _ = assemble.build_datasets(phase, assemble.build_processor(phase), args.seed)
    require_enough_steps(phase, args, train_set)
    build_questions(phase, train_set.encoder, args.seed)
    return bool(args.process_index == 0)


def chain(recipe: Recipe) -> list[Recipe]:
    """Return the phases' recipes; each starts from the result of the one before, which is always saved.

    Raises:
        RecipeError: a phase cannot start from the one before.
    """
    runs: list[Recipe] = []
    for phase in recipe.phases:
        run = deepcopy(phase)
        if runs:
            _start_from(run, runs[-1])
            runs[-1].training.save_final = True
        runs.append(run)
    return runs


def folder_of(run: Recipe) -> Path:
    """Return the output directory of a recipe."""
    return Path(run.training.arguments["output_dir"])


def between() -> None:
    """Wait for all ranks, and forget accelerate's precision, which the next phase may change."""
    if are_joined():
        torch.distributed.barrier()
    forget_precision()


def publish(recipe: Recipe) -> None:
    """Put the last phase's model into ``output_dir`` too, as hard links where the file system supports them."""
    between()
    if not recipe.training.save_final or _is_idle():
        return
    last = folder_of(recipe.phases[-1])
    ignored = shutil.ignore_patterns(*NOT_PUBLISHED)
    with sealed_result(last.parent):
        if rank() == 0:
            shutil.copytree(last, last.parent, copy_function=_link, ignore=ignored, dirs_exist_ok=True)


def _is_idle() -> bool:
    """Return True on all ranks but the first if they are not joined, as in a start that finds every phase finished."""
    return not are_joined() and os.environ.get("RANK", "0") != "0"


def _start_from(run: Recipe, before: Recipe) -> None:
    """Make the result of ``before`` the start of ``run``."""
    earlier, method = before.tuner.train_type, run.tuner.train_type
    if METHODS[earlier].adapter:
        if method != earlier:
            raise RecipeError(
                f"phase {run.phase}: tuner.train_type={method} cannot start from the adapter of "
                f"tuner.train_type={earlier}. Keep one type; or end here, merge (qwenvl-ft merge) and start a new run."
            )
        run.model.model, run.model.model_revision = before.model.model, before.model.model_revision
        start_from(run, str(folder_of(before)), adapter=True)
        return
    if method == earlier == "llamapro":
        raise RecipeError(
            f"phase {run.phase}: tuner.train_type=llamapro would add its blocks again. Set tuner.train_type=full "
            "in this phase, which trains the whole longer model or the parameters in tuner.trainable_parameters."
        )
    start_from(run, str(folder_of(before)), adapter=False)
    run.tuner.resume_from_checkpoint = None


def _is_finished(run: Recipe) -> bool:
    """Return True if an earlier start of this run trained the phase to its end.

    Raises:
        RecipeError: ``training.resume_from_checkpoint`` names one checkpoint, or the weights alone are asked for.
        CheckpointError: this is a fresh start into the folder of an earlier run.
    """
    resume, folder = resume_setting(run.training.resume_from_checkpoint), folder_of(run)
    resumes = str(resume).lower() in AUTO
    if run.training.resume_weights_only:
        raise RecipeError(
            f"{WEIGHTS_ONLY}: a recipe with phases starts from model.model, or tuner.resume_from_checkpoint for an "
            "adapter. Name the folder there."
        )
    if not resumes and not is_fresh(resume):
        raise RecipeError(
            f"training.resume_from_checkpoint={resume}: for a recipe with phases give true, which finds the phase and "
            "the checkpoint to resume."
        )
    if finished(folder) and not resumes:
        raise CheckpointError(
            f"training.output_dir={folder.parent} holds {folder.name} of an earlier run. Resume it with "
            "training.resume_from_checkpoint=true, or choose another folder."
        )
    return finished(folder) and content_fault(folder) is None


def _announce(recipe: Recipe, runs: list[Recipe], pending: list[Recipe]) -> None:
    """Save the recipe and print its phases."""
    run_log = RunLog()
    run_log.folder = folder_of(recipe)
    run_log.folder.mkdir(parents=True, exist_ok=True)
    recipe.save(run_log.folder / "recipe.yaml")
    for run in runs:
        run_log.write(f"phase {run.phase}: {folder_of(run)}" + ("" if run in pending else ", finished before"))


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
