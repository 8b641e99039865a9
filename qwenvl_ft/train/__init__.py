"""Train by a recipe: ``accelerate launch -m qwenvl_ft.train recipe=NAME section.key=value ...``.

Four checks stand between a recipe and its first step. Each fails with one line, before anything is written:

| question | answered by | needs |
|---|---|---|
| Is the recipe consistent? | `qwenvl_ft.recipe.checks`, when it is loaded | the recipe alone |
| Can this machine run it? | `qwenvl_ft.training.preflight` | packages, devices, folders, the model's config.json |
| Does the checkpoint belong to this run? | `qwenvl_ft.checkpoint.same_run` | the checkpoint that is resumed |
| Is the data sound? | `qwenvl_ft.training.data_gate` | the records (``data.check_dataset_strategy``) |

`qwenvl_ft` imports the function `train` over this package of the same name, so that ``qwenvl_ft.train(recipe)`` works
whatever was imported before. This file must therefore stay light: it imports what it needs when it needs it.
"""

import signal
import sys
from typing import TYPE_CHECKING

LAUNCHED = (
    "The launcher reports this exit with a traceback of its own, below. The cause is the error in the line above."
)

if TYPE_CHECKING:
    from qwenvl_ft.recipe.schema import Recipe
    from qwenvl_ft.training.result import TrainResult


def train(recipe: "Recipe") -> "TrainResult":
    """Run a recipe from model and data to checkpoint and evaluation; the phases of a curriculum in turn.

    The process is left as it was, so that a second call trains what it would train in a process of its own.

    Raises:
        QwenVLError: the recipe, the data or a checkpoint is wrong (found before anything is written), or training
            cannot continue: a loss is not finite, or a device is out of memory.
    """
    from qwenvl_ft.training.process_state import restored_process
    from qwenvl_ft.upstream.quiet import quiet

    with restored_process():
        if recipe.phases:
            return _train_phases(recipe)
        from qwenvl_ft.training.prepare import unused_packages  # some of its imports draw random numbers

        with unused_packages(recipe), quiet():
            return _train(recipe)


def _train(recipe: "Recipe") -> "TrainResult":
    from pathlib import Path

    from qwenvl_ft import assemble
    from qwenvl_ft.checkpoint.complete import resolve_resume
    from qwenvl_ft.checkpoint.restart import resume_setting
    from qwenvl_ft.checkpoint.same_run import require_same_engine, require_same_plan, require_same_recipe
    from qwenvl_ft.checkpoint.weights_only import from_weights_only
    from qwenvl_ft.training.agreement import Agreement, only_run_of
    from qwenvl_ft.training.build import build_questions, build_trainer
    from qwenvl_ft.training.data_gate import check_before_training
    from qwenvl_ft.training.prepare import prepare_run
    from qwenvl_ft.training.run import run
    from qwenvl_ft.training.run_length import require_enough_steps
    from qwenvl_ft.training.streams import shared_stream

    recipe = from_weights_only(recipe)
    args = prepare_run(recipe)
    output_dir = Path(str(args.output_dir))
    ranks = Agreement.of(args)
    with only_run_of(ranks, output_dir, on_rank_0=args.process_index == 0):
        start = resolve_resume(resume_setting(recipe.training.resume_from_checkpoint), output_dir)
        if start.folder is not None:
            require_same_recipe(recipe, start.folder)
        if not recipe.phase:  # the data of all phases were checked before the first one
            check_before_training(recipe)
        processor = assemble.build_processor(recipe)
        stream = shared_stream(recipe, args, ranks, start.folder)
        train_set, eval_set = assemble.build_datasets(recipe, processor, stream=stream)
        require_enough_steps(recipe, args, train_set)
        questions = build_questions(recipe, train_set.encoder, args.seed)
        model = assemble.build_model(recipe, args, train_set)
        trainer = build_trainer(recipe, args, model, processor, train_set, eval_set, questions=questions)
        if start.folder is not None:
            require_same_engine(start.folder, trainer.engine, args.world_size)
            require_same_plan(trainer.plan_sampler(train_set), start.folder, any_rows=bool(args.auto_find_batch_size))
        result = run(trainer, recipe, start, questions)
        if result.stopped_by is None:
            train_set.close()
        return result


def _train_phases(recipe: "Recipe") -> "TrainResult":
    """Run those phases of a recipe that are not finished yet, in order.

    Returns:
        The last phase's metrics, and the steps of all phases that ran now.

    Raises:
        QwenVLError: as `train` does. All phases are checked before the first one begins.
    """
    from contextlib import ExitStack

    from qwenvl_ft.training import phases
    from qwenvl_ft.training.result import TrainResult

    result = TrainResult(phases.folder_of(recipe))
    with ExitStack() as held:
        for phase in phases.open_phases(recipe, held):
            phases.between()
            done = train(phase)
            result.metrics, result.stopped_by = done.metrics, done.stopped_by
            result.steps += done.steps
            if done.stopped_by is not None:
                return result
        phases.publish(recipe)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 after a user's error, which is printed on one line, by one of the processes of a node that
        have the same; 128 + n after signal n.
    """
    from qwenvl_ft.errors import QwenVLError
    from qwenvl_ft.upstream.launcher import is_first_to_say, launched

    note = f"\n{LAUNCHED}" if launched() else ""
    try:
        from qwenvl_ft.recipe.argv import recipe_from_argv
        from qwenvl_ft.training.ranks import leave_ranks

        result = train(recipe_from_argv(sys.argv[1:] if argv is None else argv))
        leave_ranks()
    except QwenVLError as error:
        if is_first_to_say(str(error)):
            print(f"error: {error}{note}\n", end="", file=sys.stderr, flush=True)  # in one piece, also of several ranks
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if result.stopped_by is None else 128 + result.stopped_by
