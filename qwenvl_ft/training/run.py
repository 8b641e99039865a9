"""Runs a trainer from its first step to the saved model, or to the checkpoint of a signal."""

import signal
from pathlib import Path

import torch

from qwenvl_ft.checkpoint.complete import Resume, remove_partial
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.announce import announce
from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.callbacks.signals import Interrupted, SignalCallback
from qwenvl_ft.training.finish import finish
from qwenvl_ft.training.out_of_memory import out_of_memory
from qwenvl_ft.training.result import TrainResult
from qwenvl_ft.training.trainer import QwenVLTrainer

RESUME = "training.resume_from_checkpoint=true"


def run(trainer: QwenVLTrainer, recipe: Recipe, start: Resume, questions: Questions | None) -> TrainResult:
    """Train, then save the model and answer the questions.

    Args:
        start: the checkpoint to go on from, if any, and those that are passed over.
        questions: answered at the end, if the recipe says so.

    Raises:
        QwenVLError: training cannot continue; the message says why, and what is saved.
    """
    run_log, signals = RunLog(recipe.phase), SignalCallback(trainer.agreement)
    trainer.add_callback(run_log)
    trainer.listen_to(signals)
    output_dir = Path(str(trainer.args.output_dir))
    announce(trainer, run_log, start, removed=remove_partial(output_dir))
    try:
        output = trainer.train(resume_from_checkpoint=start)
        result = TrainResult(output_dir, dict(output.metrics), output.global_step)
        if not trainer.interrupted and (signals.stopping is None or output.global_step >= trainer.state.max_steps):
            result.metrics |= finish(trainer, questions, run_log)
            return result
        if trainer.is_world_process_zero():
            run_log.write(f"{_stopped(signals)} at step {output.global_step}; to go on, add {RESUME}")
        result.stopped_by = signals.stopping
    except Interrupted:
        if trainer.is_world_process_zero():
            run_log.write(f"{_stopped(signals)} before all questions were answered; the trained model is saved")
        result.stopped_by = signals.stopping
    except torch.OutOfMemoryError as error:
        raise out_of_memory(recipe, trainer.args, trainer.state.global_step, error) from error
    finally:
        signals.restore()
        run_log.stop()
    return result


def _stopped(signals: SignalCallback) -> str:
    return f"stopped by {signal.Signals(signals.stopping).name}" if signals.stopping else "stopped"
