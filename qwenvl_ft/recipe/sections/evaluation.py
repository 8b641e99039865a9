"""The section ``evaluation``: a test of the trained model by generated answers."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from qwenvl_ft.recipe.choices import OneOf
from qwenvl_ft.recipe.limits import Positive


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation by generated answers."""

    run_after_training: bool = False
    """Generate and score answers for the evaluation data once training is done."""
    run_during_training: bool = False
    """Generate and score answers at each evaluation (training.eval_strategy) too, and log the scores as eval_NAME."""
    data: str | list[str] | None = None
    """Records to answer, written as in data.val; null takes data.val."""
    limit: Positive | None = None
    """Use only this number of records, from the first; null uses all."""
    metric: Annotated[str, OneOf("qwenvl_ft.evaluation.metrics:METRICS")] = "exact_match"
    """Metric of the answers; geometry scores boxes, quads and lines, each kind by itself."""
    metric_options: dict[str, Any] = field(default_factory=dict)
    """Options of the metric, such as {ignore_case: true} of exact_match, or {iou: 0.3, by_class: false} of geometry."""
    max_new_tokens: Positive = 128
    """Maximum length of an answer, in tokens."""
    batch_size: Positive = 8
    """Number of prompts generated together."""

    @property
    def asks(self) -> bool:
        """True if answers are generated at all."""
        return self.run_after_training or self.run_during_training
