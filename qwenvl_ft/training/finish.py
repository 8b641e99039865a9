"""Saves the trained model at the end of a run and evaluates it by generation."""

from pathlib import Path
from typing import Any

from qwenvl_ft.checkpoint.space import written_whole
from qwenvl_ft.errors import DataError
from qwenvl_ft.export.engines import silent_losses
from qwenvl_ft.training.agreement import OtherRankError
from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.sealed import sealed_result
from qwenvl_ft.training.trainer import QwenVLTrainer


def finish(trainer: QwenVLTrainer, questions: Questions | None, run_log: RunLog) -> dict[str, float]:
    """Save the model (unless ``training.save_final`` is false) and the trainer's state; answer the questions, if any.

    Returns:
        The scores of the answers by name; empty without questions.

    Raises:
        CheckpointError: the model could not be written.
        DataError: a question cannot be asked; the model is saved.
        OtherRankError: another rank has met an error that is not the user's; the model is saved.
        Interrupted: a signal has arrived before all questions were answered; the model is saved.
    """
    folder = Path(str(trainer.args.output_dir))
    whole = written_whole(folder, trainer.result_bytes, removes=trainer.is_world_process_zero())
    with trainer.writing(), whole, sealed_result(folder):
        if trainer.saves_result:
            trainer.save_result()
        trainer.save_state()
    if trainer.saves_result and trainer.is_world_process_zero() and (folder / "adapter_config.json").is_file():
        model: Any = trainer.model
        for line in silent_losses(folder, model.config.model_type):
            run_log.write(line)
    if questions is None or not questions.section.run_after_training:
        return {}
    saved = f"The trained model is saved in {folder}." if trainer.saves_result else ""
    try:
        scores, line = questions.ask(trainer)
    except (DataError, OtherRankError) as error:
        raise type(error)(f"{error} {saved}") from error
    if trainer.is_world_process_zero():
        run_log.write(line)
    return scores
