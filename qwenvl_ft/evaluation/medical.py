"""Metrics for answers about medical images: classes, labels, boxes, counts and measurements.

Each metric takes references and answers as texts in the same order and returns name -> number. ``n_unparsed`` of the
``count`` answers could not be parsed; they count as wrong.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.matching import box_iou, match, require_pairs
from qwenvl_ft.evaluation.parse import (
    Box,
    parse_boxes,
    parse_class,
    parse_instances,
    parse_labels,
    parse_letter,
    parse_number,
    plain,
)

Metrics = dict[str, Any]

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""A box is found if its intersection over union is above the threshold."""
BREAKDOWN_THRESHOLD = 0.3
"""IoU threshold of the results per id."""


def classification(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Return balanced accuracy (mean recall over the references' classes), accuracy and weighted F1.

    If the reference is a letter, the answer is parsed as a letter, otherwise as one of the references' class names.
    """
    require_pairs(references, answers)
    expected = [plain(reference) for reference in references]
    names = {name for name in expected if not _is_letter(name)}
    answered = [_class_of(answer, name, names) for answer, name in zip(answers, expected, strict=True)]
    support, predicted = Counter(expected), Counter(name for name in answered if name is not None)
    hits = Counter(name for name, answer in zip(expected, answered, strict=True) if name == answer)
    recall = {name: hits[name] / support[name] for name in sorted(support)}
    f1 = {name: 2 * hits[name] / (support[name] + predicted[name]) for name in support}
    count = len(expected)
    return {
        "balanced_accuracy": sum(recall.values()) / len(recall),
        "accuracy": hits.total() / count,
        "weighted_f1": sum(f1[name] * support[name] for name in support) / count,
        "recall": recall,
        "count": count,
        "n_unparsed": answered.count(None),
    }


def multi_label(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Return the F1 of label sets, averaged over samples and over all labels (micro), and the share of equal sets.

    A label may contain a comma if some reference lists it between semicolons.
    """
    require_pairs(references, answers)
    known = {label for reference in references if ";" in reference for label in parse_labels(reference)}
    pairs = [(parse_labels(r, known), parse_labels(a, known)) for r, a in zip(references, answers, strict=True)]
    hits = sum(len(expected & answered) for expected, answered in pairs)
    total = sum(len(expected) + len(answered) for expected, answered in pairs)
    return {
        "f1_samples": _mean(_f1(len(e & g), len(e) + len(g)) for e, g in pairs),
        "f1_micro": _f1(hits, total),
        "exact_match": _mean(float(expected == answered) for expected, answered in pairs),
        "count": len(pairs),
        "n_unparsed": sum(bool(expected) and not answered for expected, answered in pairs),
    }


def detection(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Return the F1 of boxes at each IoU threshold, counted over the whole set, and the mean over thresholds.

    Boxes are matched one to one, the pair with the largest IoU first.
    """
    require_pairs(references, answers)
    expected = [{"": _required(parse_boxes(text), text)} for text in references]
    read = [parse_boxes(text) for text in answers]
    answered = [{"": boxes or []} for boxes in read]
    return _by_threshold(expected, answered) | {"count": len(read), "n_unparsed": read.count(None)}


def instance_detection(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Score as `detection`, but match boxes only within the same id; adds the F1 of each id at an IoU of 0.3."""
    require_pairs(references, answers)
    expected = [_required(parse_instances(text), text) for text in references]
    read = [parse_instances(text) for text in answers]
    answered = [boxes or {} for boxes in read]
    names = sorted({name for boxes in expected for name in boxes})
    by_id = {
        name: _scores(_match_all(_only(expected, name), _only(answered, name), BREAKDOWN_THRESHOLD))["f1"]
        for name in names
    }
    totals = {"f1_by_id": by_id, "count": len(read), "n_unparsed": read.count(None)}
    return _by_threshold(expected, answered) | totals


def counting(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Return the mean absolute error of counts (an unparsed answer counts as 0), and the shares that are close."""
    expected, filled, parsed = _numbers(references, answers)
    off = np.abs(expected - filled)
    read = ~np.isnan(parsed)
    return _errors(expected, filled, parsed) | {
        "exact": float(np.mean(read & (off == 0))),
        "within_1": float(np.mean(read & (off <= 1))),
        "within_5_percent": float(np.mean(read & (off <= 0.05 * np.abs(expected)))),
    }


def regression(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Return the mean absolute error of measurements (an unparsed answer counts as 0), RMSE and R2."""
    expected, filled, parsed = _numbers(references, answers)
    residual = float(np.sum((expected - filled) ** 2))
    spread = float(np.sum((expected - expected.mean()) ** 2))
    r2 = 1 - residual / spread if spread else float(residual == 0)
    return _errors(expected, filled, parsed) | {"r2": r2}


def _errors(expected: NDArray[Any], filled: NDArray[Any], parsed: NDArray[Any]) -> Metrics:
    """Return the errors over all answers, and over those that could be parsed.

    Args:
        filled: the parsed answers, with 0 for those that could not be parsed.
        parsed: the same, with NaN instead of 0.
    """
    read = ~np.isnan(parsed)
    return {
        "mae": float(np.mean(np.abs(expected - filled))),
        "mae_parsed": float(np.mean(np.abs(expected - filled)[read])) if read.any() else None,
        "rmse": float(np.sqrt(np.mean((expected - filled) ** 2))),
        "count": len(expected),
        "n_unparsed": int((~read).sum()),
    }


Grouped = dict[str, list[Box]]


def _by_threshold(expected: Sequence[Grouped], answered: Sequence[Grouped]) -> Metrics:
    scores = {threshold: _scores(_match_all(expected, answered, threshold)) for threshold in THRESHOLDS}
    f1 = {f"f1@{threshold}": score["f1"] for threshold, score in scores.items()}
    return (
        f1
        | {"f1_mean": _mean(f1.values())}
        | {f"{name}@0.5": scores[0.5][name] for name in ("precision", "recall", "tp", "fp", "fn")}
    )


def _match_all(expected: Sequence[Grouped], answered: Sequence[Grouped], threshold: float) -> tuple[int, int, int]:
    """Return the numbers of matched, predicted and expected boxes over all samples and ids."""
    hits = sum(
        len(match(box_iou(boxes[name], answer[name]), threshold))
        for boxes, answer in zip(expected, answered, strict=True)
        for name in boxes.keys() & answer.keys()
    )
    found, there = (sum(len(boxes) for item in side for boxes in item.values()) for side in (answered, expected))
    return hits, found, there


def _scores(counts: tuple[int, int, int]) -> Metrics:
    hits, found, there = counts
    return {
        "f1": _f1(hits, found + there),
        "precision": hits / found if found else float(not there),
        "recall": hits / there if there else 1.0,
        "tp": hits,
        "fp": found - hits,
        "fn": there - hits,
    }


def _only(items: Sequence[Grouped], name: str) -> list[Grouped]:
    return [{name: item[name]} if name in item else {} for item in items]


def _numbers(
    references: Sequence[str], answers: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return three float64[count]: the references, and the answers with 0 and with NaN for unparsed ones."""
    require_pairs(references, answers)
    expected = np.array([_required(parse_number(text), text) for text in references], dtype=np.float64)
    parsed = np.array([parse_number(text) for text in answers], dtype=np.float64)  # None becomes NaN
    return expected, np.nan_to_num(parsed), parsed


def _class_of(answer: str, expected: str, names: set[str]) -> str | None:
    if _is_letter(expected):
        letter = parse_letter(answer)
        return letter.casefold() if letter else None
    return parse_class(answer, names)


def _is_letter(name: str) -> bool:
    return len(name) == 1 and name.isascii() and name.isalpha()


def _f1(hits: int, both: int) -> float:
    """Return 2 TP / (2 TP + FP + FN); 1.0 if nothing was expected and nothing was answered."""
    return 2 * hits / both if both else 1.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _required(value: Any, text: str) -> Any:
    if value is None:
        raise DataError(f"the reference {text[:80]!r} cannot be read as an answer to its task. Correct the record.")
    return value
