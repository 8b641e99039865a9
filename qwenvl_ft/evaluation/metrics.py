"""How an answer is compared with the one that the record holds."""

import unicodedata
from collections.abc import Callable, Sequence

from qwenvl_ft.errors import unknown_name


def normalise(text: str, *, strip: bool = True, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    """What is left of a text once differences that do not matter are removed.

    Unicode is always brought to one form (NFC), as the tokenizer does: "e" with a combining accent equals "é".

    Args:
        strip: drop white space at both ends.
        ignore_case: fold case, so that "Yes" equals "yes" and "STRASSE" equals "straße".
        ignore_punctuation: drop punctuation, then white space at both ends if ``strip``; "7." equals "7".
    """
    text = unicodedata.normalize("NFC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    return text.strip() if strip else text


def exact_match(answer: str, expected: str, **options: bool) -> float:
    """1.0 where both are equal after `normalise`, which takes the options; else 0.0."""
    return float(normalise(answer, **options) == normalise(expected, **options))


Metric = Callable[..., float]

METRICS: dict[str, Metric] = {"exact_match": exact_match}
"""``evaluation.metric`` -> ``metric(answer, expected, **options)``, from 0.0 to 1.0 for one record."""


def metric_of(name: str) -> Metric:
    """The metric of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in METRICS:
        raise unknown_name("evaluation.metric", name, METRICS)
    return METRICS[name]


def mean(scores: Sequence[float]) -> float:
    """The mean over records; of none it is 0.0."""
    return sum(scores) / len(scores) if scores else 0.0
