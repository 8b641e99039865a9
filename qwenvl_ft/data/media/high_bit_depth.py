"""How do values deeper than 8 bits become the 8 bits that the model sees?

A window [low, high] maps a value v to ``floor(255 * (min(max(v, low), high) - low) / (high - low) + 0.5)``, computed in
float64: low and everything below becomes 0, high and everything above 255, halves are rounded up. NaN becomes 0. The
methods differ in their window:

- ``window``: ``window`` of the settings, or else the window that a DICOM file states;
- ``minmax``: the smallest and the largest finite value of the image;
- ``percentile``: its 0.5th and 99.5th percentile (linear interpolation); ``minmax`` if both are equal;
- ``clip``: 0 to 255, without scaling.

Colours share one window, and alpha is dropped. An image of one value only becomes 0 with ``minmax`` and ``percentile``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.media.reading import WINDOW, Reading
from qwenvl_ft.errors import DataError

PERCENTILES = (0.5, 99.5)
CHOICES = "also as keys of a data set's entry or of a record"


class HighBitDepthError(DataError):
    """An image has values deeper than 8 bits, and no setting says how to convert them."""


class UnsupportedError(Exception):
    """A file cannot be read as an image; `opened_image` adds the file's name."""


@dataclass(frozen=True)
class DeepPixels:
    """The values of an image as its file means them."""

    values: NDArray[Any]
    """[H, W], or [H, W, 3] for colours, without alpha."""
    mode: str
    """What the file holds, as in `stored_mode`."""
    window: tuple[float, float] | None = None
    """Window that the file states."""
    inverted: bool = False
    """True if low values are bright (DICOM's MONOCHROME1)."""


def to_8_bit(deep: DeepPixels, reading: Reading, name: str) -> NDArray[np.uint8]:
    """Convert values to uint8[H, W, 3]; grey values are repeated.

    Raises:
        HighBitDepthError: the settings do not say how.
    """
    pixels = deep.values
    if pixels.dtype != np.uint8:  # else a medical file of 8 bits
        low, high = window_of(deep, reading, name)
        pixels = scaled(pixels, low, high)
    if deep.inverted:
        pixels = 255 - pixels
    return np.ascontiguousarray(np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels)


def window_of(deep: DeepPixels, reading: Reading, name: str) -> tuple[float, float]:
    """Return the (low, high) that become 0 and 255.

    Raises:
        HighBitDepthError: the method is ``error``, or ``window`` and neither the settings nor the file have one.
    """
    method = reading.high_bit_depth
    if method == WINDOW and (window := reading.window or deep.window) is not None:
        return window
    if method == "clip":
        return 0.0, 255.0
    low, high = value_range(deep.values)
    if method == "minmax":
        return low, high
    if method == "percentile":
        finite = deep.values[np.isfinite(deep.values)] if deep.values.dtype.kind == "f" else deep.values
        limits = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
        return (low, high) if limits[0] == limits[1] else (float(limits[0]), float(limits[1]))
    found = f"image {name} holds values of more than 8 bits (mode {deep.mode}, found {low:g} to {high:g})"
    if method == WINDOW:
        raise HighBitDepthError(f"{found} and no window. Set data.window=[low,high], {CHOICES}.")
    own = "" if deep.window is None else f"; the file's own window is {deep.window[0]:g} to {deep.window[1]:g}"
    raise HighBitDepthError(
        f"{found}{own}. Set data.high_bit_depth to window (with data.window=[low,high]), minmax, percentile or clip, "
        f"{CHOICES}."
    )


def value_range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest finite value; zeros if there is none."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map low to 0 and high to 255 by the formula above; a window without width gives 0."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.uint8)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2 and values.size > 2**16:  # a table is faster
        table = _formula(np.arange(2**16), low, high)
        return table[values.astype(np.uint16, copy=False)]
    return _formula(values, low, high)


def _formula(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    raised = np.clip(values.astype(np.float64), low, high) - low
    return np.nan_to_num(np.floor(255 * raised / (high - low) + 0.5)).astype(np.uint8)
