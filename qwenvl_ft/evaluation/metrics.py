"""Metrics that compare answers with the expected ones, by name."""

import inspect
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.errors import DataError, RecipeError, hint, unknown_name
from qwenvl_ft.recipe.choices import imported
from qwenvl_ft.recipe.values import convert

Scores = dict[str, Any]
"""Name -> number, None (nothing to divide by), or such a mapping by kind or class."""


@dataclass(frozen=True)
class Metric:
    """A metric of a set of answers."""

    function: str | Callable[..., Scores]
    """``function(references, answers, **options)``, or its place as ``module:function``, imported when it is used."""
    primary: str
    """Key of the score by which models are compared."""
    higher_is_better: bool = True
    """True: from 0.0 to 1.0, the best. False: an error of 0 or more."""

    def score(self, references: Sequence[str], answers: Sequence[str], **options: Any) -> Scores:
        """Return the scores of answers, given in the order of the references.

        Raises:
            DataError: a reference is no answer to this metric's task, or the numbers of texts differ.
        """
        return self._resolved()(references, answers, **options)

    def is_perfect(self, scores: Scores) -> bool:
        """Return True if the primary score cannot be better; also without anything to score."""
        return scores[self.primary] in (None, 1.0 if self.higher_is_better else 0.0)

    def options(self) -> dict[str, Any]:
        """Return the options that a recipe or a command can set, with their defaults."""
        parameters = inspect.signature(self._resolved()).parameters.values()
        return {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not None
        }

    def checked(self, options: dict[str, Any], key: str) -> dict[str, Any]:
        """Return options in the types of their defaults.

        Args:
            key: recipe key or flag of the options, for messages.

        Raises:
            RecipeError: an option is unknown, or its value has the wrong type.
        """
        known = self.options()
        for name in options:
            if name not in known:
                raise RecipeError(f"{key}: {name!r} is no option of this metric.{hint(name, known)}")
        return {name: convert(value, type(known[name]), f"{key}.{name}") for name, value in options.items()}

    def _resolved(self) -> Callable[..., Scores]:
        return imported(self.function) if isinstance(self.function, str) else self.function


def per_answer(name: str, compare: Callable[..., float]) -> Metric:
    """Return the metric that is the mean over all answers of ``compare(answer, expected, **options)``, 0.0 to 1.0."""

    def score(references: Sequence[str], answers: Sequence[str], **options: Any) -> Scores:
        points = [compare(answer, wanted, **options) for answer, wanted in zip(answers, references, strict=True)]
        return {name: mean(points), "count": len(points)}

    setattr(score, "__signature__", inspect.signature(compare))  # noqa: B010 - names the options, and mypy lacks the name
    return Metric(score, name)


def normalise(text: str, *, strip: bool = True, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    """Normalise a text for comparison.

    Unicode is always normalised to NFC, as the tokenizer does: "e" with a combining accent equals "é".

    Args:
        strip: remove white space at both ends.
        ignore_case: fold case, so that "Yes" equals "yes" and "STRASSE" equals "straße".
        ignore_punctuation: remove punctuation, then white space at both ends if ``strip``; "7." equals "7".
    """
    text = unicodedata.normalize("NFC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    return text.strip() if strip else text


def exact_match(
    answer: str, expected: str, *, strip: bool = True, ignore_case: bool = False, ignore_punctuation: bool = False
) -> float:
    """Return 1.0 if both texts are equal after `normalise` with these options, otherwise 0.0."""
    options = {"strip": strip, "ignore_case": ignore_case, "ignore_punctuation": ignore_punctuation}
    return float(normalise(answer, **options) == normalise(expected, **options))


GEOMETRY = "geometry"
"""The metric of boxes, quads and lines."""
METRICS: dict[str, Metric] = {
    "exact_match": per_answer("exact_match", exact_match),
    GEOMETRY: Metric("qwenvl_ft.evaluation.localization:geometry_accuracy", "f1"),
    "classification": Metric("qwenvl_ft.evaluation.medical:classification", "balanced_accuracy"),
    "multi_label": Metric("qwenvl_ft.evaluation.medical:multi_label", "f1_samples"),
    "detection": Metric("qwenvl_ft.evaluation.medical:detection", "f1@0.5"),
    "instance_detection": Metric("qwenvl_ft.evaluation.medical:instance_detection", "f1@0.5"),
    "counting": Metric("qwenvl_ft.evaluation.medical:counting", "mae", higher_is_better=False),
    "regression": Metric("qwenvl_ft.evaluation.medical:regression", "mae", higher_is_better=False),
    "report_generation": Metric("qwenvl_ft.flare.report_score:report_generation", "green_stand_in"),
}
"""Name, as in ``evaluation.metric`` and ``qwenvl-ft score --metric``, -> metric.

The primary score of reports is the rule-based stand-in for GREEN, never GREEN itself.
"""


def metric_of(name: str, key: str = "evaluation.metric") -> Metric:
    """Return the metric of that name.

    Args:
        key: recipe key or flag of the name, for messages.

    Raises:
        RecipeError: there is no such metric.
    """
    if name not in METRICS:
        raise unknown_name(key, name, METRICS)
    return METRICS[name]


def require_readable(name: str, reference: str, where: str) -> None:
    """Raise unless a text can be the reference of a metric.

    Raises:
        DataError: it cannot; the message begins with ``where``.
    """
    try:
        metric_of(name).score([reference], [reference])
    except DataError as error:
        raise DataError(f"{where}: {name} cannot score this answer: {error}") from None


def figures(name: str, scores: Scores) -> dict[str, float]:
    """Return scores as numbers for a log: the primary one under the metric's name, the others behind it.

    Example:
        ``geometry`` 0.5, ``geometry_count`` 8, ``geometry_bbox_f1`` 0.7. Scores of None are left out.
    """
    primary = metric_of(name).primary
    flat = {name: scores[primary]}
    for key, value in scores.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{key}_{inner}": number for inner, number in value.items()}
        elif key != primary:
            flat[f"{name}_{key}"] = value
    return {key: value for key, value in flat.items() if value is not None}


def one_line(name: str, scores: Scores) -> str:
    """Return the primary score, and the F1 of each kind, as a text.

    Example:
        ``geometry 61.54% of 8 (bbox 70.00%, quad 50.00%, line none)``, where none means that there are no lines.
    """
    metric = metric_of(name)
    kinds = [f"{kind} {_shown(part['f1'])}" for kind, part in scores.items() if isinstance(part, dict) and "f1" in part]
    value = scores[metric.primary]
    shown = _shown(value) if metric.higher_is_better else f"{metric.primary} {value:.4g}"
    text = f"{name.replace('_', ' ')} {shown} of {scores['count']}"
    return f"{text} ({', '.join(kinds)})" if kinds else text


def as_text(scores: Scores) -> str:
    """Return all scores as lines; those of a kind or class on one line."""
    width = max(map(len, scores))
    lines = []
    for key, value in scores.items():
        inner = value.items() if isinstance(value, dict) else ()
        shown = "  ".join(f"{part} {_number(number)}" for part, number in inner) if inner else _number(value)
        lines.append(f"{key:<{width}}  {shown}")
    return "\n".join(lines)


def mean(scores: Sequence[float]) -> float:
    """Return the mean over records; 0.0 if there are none."""
    return sum(scores) / len(scores) if scores else 0.0


def _shown(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "none" if value is None else str(value)
