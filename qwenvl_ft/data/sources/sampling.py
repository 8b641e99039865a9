"""Choose the rows of a mixture: rates, weights, sampling and the validation split, each a function of the seed alone.

Rows are a `range` (a whole file; it pickles as two numbers) or row numbers int32[R], which may repeat.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = range | NDArray[np.int32]


def draw_rows(rows: Rows, rate: float, key: str) -> Rows:
    """Take all rows once per whole 1.0 of ``rate``, and a random subset, in order, for the fraction.

    Args:
        key: seeds the subset.

    Example:
        Rate 2.5 over 4 rows gives ``[0, 1, 2, 3, 0, 1, 2, 3, 0, 2]``.
    """
    if rate == 1:
        return rows
    whole, rest = divmod(rate, 1.0)
    count = round(rest * len(rows))
    places = np.sort(_rng(key).permutation(len(rows))[:count]) if count else np.empty(0, dtype=np.int64)
    numbers = np.asarray(rows, dtype=np.int32)
    return np.concatenate([np.tile(numbers, int(whole)), numbers[places]])


def validation_mask(num_rows: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """Return bool[num_rows]: True for the rows of a file that are held out for validation.

    The mask depends on the number of rows and not on a name, so that one file under two names gives the same rows, and
    a file may be moved. If there are two rows or more, at least one is held out and one kept.
    """
    count = min(max(round(ratio * num_rows), 1), num_rows - 1)
    chosen = np.zeros(num_rows, dtype=bool)
    chosen[_rng(f"{seed}:held out:{num_rows}").permutation(num_rows)[:count]] = True
    return chosen


def rates_of_weights(sizes: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return the largest rates, at most 1, at which data sets of these sizes have the proportions of the weights.

    Example:
        Sizes 100 and 1000 with weights 1 and 3 give rates 1.0 and 0.3.
    """
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [weight * unit / size for size, weight in zip(sizes, weights, strict=True)]


def split_places(parts: Sequence[Rows], places: Rows) -> list[Rows]:
    """Split places in the concatenation of ``parts`` into the rows taken of each part, in order."""
    ends = np.cumsum([len(part) for part in parts])
    joined = np.asarray(places, dtype=np.int64)
    taken: list[Rows] = []
    for part, end in zip(parts, ends, strict=True):
        inside = joined[(joined >= end - len(part)) & (joined < end)] - (end - len(part))
        taken.append(np.asarray(part, dtype=np.int32)[inside])
    return taken


def _rng(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
