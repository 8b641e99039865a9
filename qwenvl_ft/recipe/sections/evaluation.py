"""The section ``evaluation``: a test of the trained model by generated answers."""

from dataclasses import dataclass
from typing import Annotated

from qwenvl_ft.recipe.choices import OneOf
from qwenvl_ft.recipe.limits import Positive


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation by generated answers."""

    run_after_training: bool = False
    """Generate and score answers for the evaluation data once training is done."""
    data: str | list[str] | None = None
    """Records to answer, written as in data.val; null takes data.val."""
    limit: Positive | None = None
    """Use only this number of records, from the first; null uses all."""
    metric: Annotated[str, OneOf("qwenvl_ft.evaluation.metrics:METRICS")] = "exact_match"
    """Metric that scores an answer."""
    max_new_tokens: Positive = 128
    """Maximum length of an answer, in tokens."""
    batch_size: Positive = 8
    """Number of prompts generated together."""
