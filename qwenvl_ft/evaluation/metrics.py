"""Metrics that compare an answer with the expected one."""

import unicodedata
from collections.abc import Callable, Sequence

from qwenvl_ft.errors import unknown_name


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


def exact_match(answer: str, expected: str, **options: bool) -> float:
    """Return 1.0 if both texts are equal after `normalise` with these options, otherwise 0.0."""
    return float(normalise(answer, **options) == normalise(expected, **options))


Metric = Callable[..., float]

METRICS: dict[str, Metric] = {"exact_match": exact_match}
"""``evaluation.metric`` -> ``metric(answer, expected, **options)``, from 0.0 to 1.0 for one record."""


def metric_of(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        RecipeError: there is no such metric.
    """
    if name not in METRICS:
        raise unknown_name("evaluation.metric", name, METRICS)
    return METRICS[name]


def mean(scores: Sequence[float]) -> float:
    """Return the mean over records; 0.0 if there are none."""
    return sum(scores) / len(scores) if scores else 0.0
