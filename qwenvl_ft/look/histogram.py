"""How are the values of a deep image distributed, before and after they become 8 bits?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.media.high_bit_depth import to_8_bit, value_range
from qwenvl_ft.data.media.images import MediaPolicy, deep_image, medium_name

BARS = 32


@dataclass(frozen=True)
class Histogram:
    """Counts of values in `BARS` equal steps."""

    mode: str
    """What the file holds."""
    reading: str
    """How it is converted."""
    low: float
    high: float
    """Smallest and largest value of the file, the ends of ``before``."""
    before: list[int]
    after: list[int]
    """Over 0 to 255."""

    def bars(self, name: str) -> list[float]:
        """Return the heights of the bars of ``before`` or ``after``, the highest 1."""
        counts = getattr(self, name)
        return [count / max(*counts, 1) for count in counts]


def depth_histogram(value: Any, policy: MediaPolicy) -> Histogram | None:
    """Return the histogram of an image deeper than 8 bits; None for any other image.

    Raises:
        DataError: it cannot be opened or converted.
    """
    found = deep_image(value, policy)
    if found is None:
        return None
    deep, reading = found
    low, high = value_range(deep.values)
    after = to_8_bit(deep, reading, medium_name(value))
    return Histogram(deep.mode, str(reading), low, high, _counts(deep.values, low, high), _counts(after, 0, 255))


def _counts(values: NDArray[Any], low: float, high: float) -> list[int]:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return np.histogram(finite, bins=BARS, range=(low, high))[0].tolist()
