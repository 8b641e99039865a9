"""Saves the trained model at the end of a run and evaluates it by generation."""

from pathlib import Path

from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.sealed import sealed_result
from qwenvl_ft.training.trainer import QwenVLTrainer


def finish(trainer: QwenVLTrainer, questions: Questions | None, run_log: RunLog) -> dict[str, float]:
    """Save the model (unless ``training.save_final`` is false) and the trainer's state; answer the questions, if any.

    Returns:
        The scores of the answers by name; empty without questions.
    """
    with sealed_result(Path(str(trainer.args.output_dir))):
        if trainer.recipe is None or trainer.recipe.training.save_final:
            trainer.save_model()
        trainer.save_state()
    if questions is None or not questions.section.run_after_training:
        return {}
    scores, line = questions.ask(trainer)
    if trainer.is_world_process_zero():
        run_log.write(line)
    return scores
