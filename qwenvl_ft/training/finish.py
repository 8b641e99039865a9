"""Saves the trained model at the end of a run and evaluates it by generation."""

from typing import Any

from qwenvl_ft.recipe.schema import EvaluationConfig
from qwenvl_ft.training.callbacks.run_log import RunLog
from qwenvl_ft.training.trainer import QwenVLTrainer


def finish(trainer: QwenVLTrainer, section: EvaluationConfig, questions: Any, run_log: RunLog) -> dict[str, float]:
    """Save the model (unless ``training.save_final`` is false) and the trainer's state; answer the questions, if any.

    Args:
        questions: from `qwenvl_ft.assemble.build_questions`.

    Returns:
        ``section.metric`` and the number of answers it is computed from; empty without questions.
    """
    if trainer.recipe is None or trainer.recipe.training.save_final:
        trainer.save_model()
    trainer.save_state()
    if questions is None:
        return {}
    from qwenvl_ft.evaluation.generate import evaluate

    result = evaluate(
        trainer.accelerator.unwrap_model(trainer.model_wrapped),
        trainer.processor,
        questions,
        metric=section.metric,
        encoder=trainer.samples.encoder,
        batch_size=section.batch_size,
        max_new_tokens=section.max_new_tokens,
    )
    if trainer.is_world_process_zero():
        name = section.metric.replace("_", " ")
        run_log.write(
            f"{name} {result[section.metric]:.2%} of {result['count']} by generation, {result['seconds']:.1f} s"
        )
    return {section.metric: result[section.metric], f"{section.metric}_count": result["count"]}
