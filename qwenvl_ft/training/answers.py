"""Answers to the questions of a run by generation, and their scores for the log."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenvl_ft.evaluation.metrics import figures, one_line
from qwenvl_ft.model.compiled import layers_not_compiled
from qwenvl_ft.recipe.schema import EvaluationConfig

if TYPE_CHECKING:
    from qwenvl_ft.training.evaluating_trainer import EvaluatingTrainer


@dataclass(frozen=True)
class Questions:
    """The questions of a run."""

    section: EvaluationConfig
    conversations: Any
    options: dict[str, Any]
    """Options of the metric."""

    def ask(self, trainer: "EvaluatingTrainer", prefix: str = "") -> tuple[dict[str, float], str]:
        """Answer all questions with the trainer's model as it is now, on all ranks.

        Returns:
            The scores by name, each with the prefix; and a line that sums them up.

        Raises:
            Interrupted: a signal has arrived; on every rank.
            DataError: a question cannot be encoded; on every rank.
        """
        from qwenvl_ft.evaluation.generate import evaluate

        trainer.check_signals()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        with layers_not_compiled(model):
            result = evaluate(
                model,
                trainer.processor,
                self.conversations,
                metric=self.section.metric,
                metric_options=self.options,
                encoder=trainer.samples.encoder,
                batch_size=self.section.batch_size,
                max_new_tokens=self.section.max_new_tokens,
                progress=lambda *_: trainer.check_signals(),
                interrupted=lambda: trainer.signals is not None and trainer.signals.received is not None,
                together=trainer.agreement.together,
            )
        scores = {f"{prefix}{key}": value for key, value in figures(self.section.metric, result["scores"]).items()}
        return scores, f"{one_line(self.section.metric, result['scores'])} by generation, {result['seconds']:.1f} s"
