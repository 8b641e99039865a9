"""Train what a recipe says: ``accelerate launch -m qwenvl_ft.train recipe=NAME section.key=value ...``."""

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from qwenvl_ft.errors import QwenVLError
from qwenvl_ft.recipe.schema import Recipe


@dataclass
class TrainResult:
    """What a run leaves behind."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    stopped_by: int | None = None
    """Number of the signal that ended the run early."""


def train(recipe: Recipe) -> TrainResult:
    """Run a recipe from model and data to checkpoint and evaluation; one with phases, each of them in turn.

    Raises:
        QwenVLError: the recipe, the data or a checkpoint is wrong; nothing was written before that was known. Or
            training cannot go on: a loss is not finite, or memory is not enough.
    """
    if recipe.phases:
        return train_phases(recipe)
    from qwenvl_ft.training.arguments import unused_packages

    with unused_packages(recipe):
        return _train(recipe)


def _train(recipe: Recipe) -> TrainResult:
    import torch

    from qwenvl_ft import assemble
    from qwenvl_ft.checkpoint.complete import resolve_resume
    from qwenvl_ft.checkpoint.same_run import require_same_plan, require_same_recipe
    from qwenvl_ft.training import setup
    from qwenvl_ft.training.arguments import build_arguments
    from qwenvl_ft.training.callbacks.progress import ProgressCallback
    from qwenvl_ft.training.callbacks.signals import SignalCallback
    from qwenvl_ft.training.gate import check_before_training
    from qwenvl_ft.training.out_of_memory import out_of_memory

    args = build_arguments(recipe)
    resume = resolve_resume(recipe.training.resume_from_checkpoint, Path(str(args.output_dir)))
    if resume is not None:
        require_same_recipe(recipe, resume)
    if not recipe.phase:  # before the first phase, all were checked
        check_before_training(recipe)
    processor = assemble.build_processor(recipe)
    train_set, eval_set = assemble.build_datasets(recipe, processor, args.seed)
    questions = assemble.build_questions(recipe, train_set.encoder, args.seed)
    model = assemble.build_model(recipe, args, train_set)
    trainer = setup.build_trainer(
        recipe,
        args,
        model,
        processor,
        train_set,
        eval_dataset=eval_set,
        callbacks=setup.callbacks(recipe, args.seed),
    )
    if resume is not None:
        require_same_plan(trainer.plan_sampler(train_set), resume, any_rows=bool(args.auto_find_batch_size))
    progress, signals = ProgressCallback(recipe.phase), SignalCallback()
    trainer.add_callback(progress)
    trainer.add_callback(signals)
    setup.tell(trainer, progress, resume)
    try:
        output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(recipe, args, trainer.state.global_step, error) from error
    finally:
        signals.restore()
    stopped_by = signals.stopping if output.global_step < trainer.state.max_steps else None
    result = TrainResult(Path(str(args.output_dir)), dict(output.metrics), output.global_step, stopped_by)
    if stopped_by is None:
        result.metrics |= setup.finish(trainer, recipe.evaluation, questions, progress)
    elif trainer.is_world_process_zero():
        cause = f"stopped by {signal.Signals(stopped_by).name} at step {output.global_step}"
        progress.say(f"{cause}; to go on, add training.resume_from_checkpoint=true")
    return result


def train_phases(recipe: Recipe) -> TrainResult:
    """Run the phases of a recipe one after the other, those that are not finished yet.

    Returns:
        The last phase's metrics, and the steps of all that were run now.

    Raises:
        QwenVLError: as `train` does; what can be known of any phase, before the first begins.
    """
    from qwenvl_ft.training import phases

    result = TrainResult(phases.folder_of(recipe))
    for run in phases.open_phases(recipe):
        phases.between()
        done = train(run)
        result.metrics, result.stopped_by = done.metrics, done.stopped_by
        result.steps += done.steps
        if done.stopped_by is not None:
            return result
    phases.publish(recipe)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line: exit code 0, 2 for a user's error (one line, nothing written), 128 + n for signal n."""
    try:
        from qwenvl_ft.recipe.argv import recipe_from_argv
        from qwenvl_ft.training.arguments import leave_processes

        result = train(recipe_from_argv(sys.argv[1:] if argv is None else argv))
        leave_processes()
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0 if result.stopped_by is None else 128 + result.stopped_by


class _Callable(ModuleType):
    """``qwenvl_ft.train`` is this module and the public function of that name; calling the module runs it."""

    def __call__(self, recipe: Recipe) -> TrainResult:
        return train(recipe)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
