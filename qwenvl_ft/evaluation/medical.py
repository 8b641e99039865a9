"""How good answers about medical images are: classes, labels, boxes, counts and measures.

Each metric takes the references and the answers as texts, in the same order, and returns numbers by name. Of the
``count`` answers ``n_unparsed`` could not be read; they count as wrong, not as absent.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import DataError
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
"""A box is found if its intersection over union is above."""
BREAKDOWN_THRESHOLD = 0.3
"""The one of the results for each id."""


def classification(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Balanced accuracy (the mean recall of the references' classes), accuracy and weighted F1.

    An answer is read as a letter where the reference is one, else as one of the references' class names.
    """
    _check_lengths(references, answers)
    expected = [plain(reference) for reference in references]
    names = {name for name in expected if not _is_letter(name)}
    given = [_class_of(answer, name, names) for answer, name in zip(answers, expected, strict=True)]
    support, predicted = Counter(expected), Counter(name for name in given if name is not None)
    hits = Counter(name for name, told in zip(expected, given, strict=True) if name == told)
    recall = {name: hits[name] / support[name] for name in sorted(support)}
    f1 = {name: 2 * hits[name] / (support[name] + predicted[name]) for name in support}
    count = len(expected)
    return {
        "balanced_accuracy": sum(recall.values()) / len(recall),
        "accuracy": hits.total() / count,
        "weighted_f1": sum(f1[name] * support[name] for name in support) / count,
        "recall": recall,
        "count": count,
        "n_unparsed": given.count(None),
    }


def multi_label(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """F1 of label sets, as the mean over samples and over all labels at once (micro), and how many sets are equal.

    A label that holds a comma is known as one from the references that join theirs with ``;``.
    """
    _check_lengths(references, answers)
    known = {label for reference in references if ";" in reference for label in parse_labels(reference)}
    pairs = [(parse_labels(r, known), parse_labels(a, known)) for r, a in zip(references, answers, strict=True)]
    hits = sum(len(expected & given) for expected, given in pairs)
    total = sum(len(expected) + len(given) for expected, given in pairs)
    return {
        "f1_samples": _mean(_f1(len(e & g), len(e) + len(g)) for e, g in pairs),
        "f1_micro": _f1(hits, total),
        "exact_match": _mean(float(expected == given) for expected, given in pairs),
        "count": len(pairs),
        "n_unparsed": sum(bool(expected) and not given for expected, given in pairs),
    }


def detection(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """F1 of boxes, hits and misses counted over the whole set, at each IoU threshold and as their mean.

    A box is matched with one other at most, the pair with the largest IoU first.
    """
    _check_lengths(references, answers)
    expected = [{"": _required(parse_boxes(text), text)} for text in references]
    read = [parse_boxes(text) for text in answers]
    given = [{"": boxes or []} for boxes in read]
    return _by_threshold(expected, given) | {"count": len(read), "n_unparsed": read.count(None)}


def instance_detection(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """As `detection`, but a box counts only for its own id; with the F1 of each id at an IoU of 0.3."""
    _check_lengths(references, answers)
    expected = [_required(parse_instances(text), text) for text in references]
    read = [parse_instances(text) for text in answers]
    given = [boxes or {} for boxes in read]
    names = sorted({name for boxes in expected for name in boxes})
    by_id = {
        name: _scores(_match_all(_only(expected, name), _only(given, name), BREAKDOWN_THRESHOLD))["f1"]
        for name in names
    }
    totals = {"f1_by_id": by_id, "count": len(read), "n_unparsed": read.count(None)}
    return _by_threshold(expected, given) | totals


def counting(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Mean absolute error of counts (an unreadable answer is taken for 0), and how many are right or nearly so."""
    expected, given, told = _numbers(references, answers)
    off = np.abs(expected - given)
    read = ~np.isnan(told)
    return _errors(expected, given, told) | {
        "exact": float(np.mean(read & (off == 0))),
        "within_1": float(np.mean(read & (off <= 1))),
        "within_5_percent": float(np.mean(read & (off <= 0.05 * np.abs(expected)))),
    }


def regression(references: Sequence[str], answers: Sequence[str]) -> Metrics:
    """Mean absolute error of a measure (an unreadable answer is taken for 0), root mean square error and R2."""
    expected, given, told = _numbers(references, answers)
    residual = float(np.sum((expected - given) ** 2))
    spread = float(np.sum((expected - expected.mean()) ** 2))
    r2 = 1 - residual / spread if spread else float(residual == 0)
    return _errors(expected, given, told) | {"r2": r2}


def _errors(expected: NDArray[Any], given: NDArray[Any], told: NDArray[Any]) -> Metrics:
    """Errors over all answers, and over those that could be read.

    Args:
        given: what counts, 0 where ``told`` is NaN because the answer could not be read.
    """
    read = ~np.isnan(told)
    return {
        "mae": float(np.mean(np.abs(expected - given))),
        "mae_parsed": float(np.mean(np.abs(expected - given)[read])) if read.any() else None,
        "rmse": float(np.sqrt(np.mean((expected - given) ** 2))),
        "count": len(expected),
        "n_unparsed": int((~read).sum()),
    }


def box_iou(boxes: Sequence[Box], others: Sequence[Box]) -> NDArray[np.float64]:
    """float64[boxes, others]: intersection over union; 0 where both areas are 0."""
    a = np.asarray(boxes, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(others, dtype=np.float64).reshape(1, -1, 4)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inner = np.prod(np.clip(size, 0, None), axis=-1)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def match(likeness: NDArray[np.float64], threshold: float) -> list[tuple[int, int]]:
    """Pairs (row, column) that are alike by more than the threshold, each row and column once, the most alike first."""
    pairs: list[tuple[int, int]] = []
    rows, columns = np.nonzero(likeness > threshold)
    order = np.argsort(-likeness[rows, columns], kind="stable")
    free_rows, free_columns = set(rows.tolist()), set(columns.tolist())
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row in free_rows and column in free_columns:
            free_rows.remove(row)
            free_columns.remove(column)
            pairs.append((row, column))
    return pairs


Grouped = dict[str, list[Box]]


def _by_threshold(expected: Sequence[Grouped], given: Sequence[Grouped]) -> Metrics:
    scores = {threshold: _scores(_match_all(expected, given, threshold)) for threshold in THRESHOLDS}
    told = {f"f1@{threshold}": score["f1"] for threshold, score in scores.items()}
    return (
        told
        | {"f1_mean": _mean(told.values())}
        | {f"{name}@0.5": scores[0.5][name] for name in ("precision", "recall", "tp", "fp", "fn")}
    )


def _match_all(expected: Sequence[Grouped], given: Sequence[Grouped], threshold: float) -> tuple[int, int, int]:
    """Over all samples and ids: boxes that are there and found, found, there."""
    hits = sum(
        len(match(box_iou(boxes[name], answer[name]), threshold))
        for boxes, answer in zip(expected, given, strict=True)
        for name in boxes.keys() & answer.keys()
    )
    found, there = (sum(len(boxes) for item in side for boxes in item.values()) for side in (given, expected))
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
    """float64[count] each: what is expected, the answers with 0 for the unreadable, and with NaN for them."""
    _check_lengths(references, answers)
    expected = np.array([_required(parse_number(text), text) for text in references], dtype=np.float64)
    told = np.array([parse_number(text) for text in answers], dtype=np.float64)  # None becomes NaN
    return expected, np.nan_to_num(told), told


def _class_of(answer: str, expected: str, names: set[str]) -> str | None:
    if _is_letter(expected):
        letter = parse_letter(answer)
        return letter.casefold() if letter else None
    return parse_class(answer, names)


def _is_letter(name: str) -> bool:
    return len(name) == 1 and name.isascii() and name.isalpha()


def _f1(hits: int, both: int) -> float:
    """2 TP / (2 TP + FP + FN); 1.0 where there was nothing to find and nothing was said."""
    return 2 * hits / both if both else 1.0


def _mean(values: Iterable[float]) -> float:
    told = list(values)
    return sum(told) / len(told)


def _required(value: Any, text: str) -> Any:
    if value is None:
        raise DataError(f"the reference {text[:80]!r} cannot be read as what its task asks for. Correct the record.")
    return value


def _check_lengths(references: Sequence[str], answers: Sequence[str]) -> None:
    if not references or len(references) != len(answers):
        raise DataError(f"{len(references)} references and {len(answers)} answers: give as many, and one at least.")
