"""Which rows a mixture takes: rates, weights, samples and a part held out, each a function of the seed alone.

Rows are a `range` (a whole file; it pickles as two numbers) or int32[R] row numbers, repeats included.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = range | NDArray[np.int32]


def drawn(rows: Rows, rate: float, key: str) -> Rows:
    """All rows once for each whole hundred percent, and a seeded draw without repeats (in order) for the rest.

    Example:
        Rate 2.5 over 4 rows gives ``[0, 1, 2, 3, 0, 1, 2, 3, 0, 2]``.
    """
    if rate == 1:
        return rows
    whole, rest = divmod(rate, 1.0)
    count = round(rest * len(rows))
    places = np.sort(_rng(key).permutation(len(rows))[:count]) if count else np.empty(0, dtype=np.int64)
    told = np.asarray(rows, dtype=np.int32)
    return np.concatenate([np.tile(told, int(whole)), told[places]])


def held_out(size: int, ratio: float, seed: int) -> NDArray[np.bool_]:
    """bool[size]: which rows of a file are for validation.

    It depends on the number of rows and not on a name, so that one file under two names gives the same rows, and a
    file may be moved. One row at least, if there are two.
    """
    count = min(max(round(ratio * size), 1), size - 1)
    chosen = np.zeros(size, dtype=bool)
    chosen[_rng(f"{seed}:held out:{size}").permutation(size)[:count]] = True
    return chosen


def shared(sizes: Sequence[int], weights: Sequence[float]) -> list[float]:
    """The rates at which data sets of these sizes stand in the proportion of the weights, none above 1.

    Example:
        Sizes 100 and 1000 with weights 1 and 3 give rates 1.0 and 0.3.
    """
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [weight * unit / size for size, weight in zip(sizes, weights, strict=True)]


def split_places(rows: Sequence[Rows], places: Rows) -> list[Rows]:
    """Places in the joined ``rows`` -> the rows of each, in order."""
    ends = np.cumsum([len(part) for part in rows])
    told = np.asarray(places, dtype=np.int64)
    taken: list[Rows] = []
    for part, end in zip(rows, ends, strict=True):
        inside = told[(told >= end - len(part)) & (told < end)] - (end - len(part))
        taken.append(np.asarray(part, dtype=np.int32)[inside])
    return taken


def _rng(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
