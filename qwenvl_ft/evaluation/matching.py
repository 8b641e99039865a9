"""Pairs answers with references: one text for each, and boxes by their intersection over union."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.parse import Box


def box_iou(boxes: Sequence[Box], others: Sequence[Box]) -> NDArray[np.float64]:
    """Return the intersection over union as float64[boxes, others]; 0 where both areas are 0."""
    a = np.asarray(boxes, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(others, dtype=np.float64).reshape(1, -1, 4)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inner = np.prod(np.clip(size, 0, None), axis=-1)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def match(likeness: NDArray[np.float64], threshold: float) -> list[tuple[int, int]]:
    """Match greedily: return pairs (row, column) above the threshold, largest first, each row and column used once."""
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


def require_pairs(references: Sequence[str], answers: Sequence[str]) -> None:
    """Raise DataError unless there are as many answers as references, and at least one."""
    if not references or len(references) != len(answers):
        raise DataError(f"{len(references)} references and {len(answers)} answers: give one answer per reference.")
