"""Contrast limited adaptive histogram equalization (CLAHE) of one channel, like OpenCV's createCLAHE."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LEVELS = 256

Band = tuple[slice, int, int, NDArray[np.float32]]
"""Pixels of one axis between two tile centres, the tile before, the tile after, and the weight of the latter."""


def equalize_adaptively(channel: NDArray[np.uint8], *, clip_limit: float, tiles: tuple[int, int]) -> NDArray[np.uint8]:
    """Equalize each tile by its own histogram, and blend the results of the four nearest tiles at every pixel.

    Args:
        channel: uint8[H, W].
        clip_limit: maximum number of pixels of one level in a tile, in multiples of (pixels of the tile / 256).
        tiles: number of tiles (down, across). A size that they do not divide is padded by reflection. (If they do not
            divide one axis, OpenCV pads both axes, the other one by a row of tiles; in all other cases the results
            differ by at most one level.)

    Returns:
        uint8[H, W].
    """
    (height, width), (down, across) = channel.shape, tiles
    tile_height, tile_width = -(-height // down), -(-width // across)
    border = ((0, tile_height * down - height), (0, tile_width * across - width))
    blocks = np.pad(channel, border, mode="reflect").reshape(down, tile_height, across, tile_width)
    tables = _tables(blocks.transpose(0, 2, 1, 3).reshape(down, across, -1), clip_limit)
    out = np.empty_like(channel)
    for y, top, bottom, weight_y in _bands(height, tile_height, down):
        for x, left, right, weight_x in _bands(width, tile_width, across):
            block, w, v = channel[y, x], weight_x[None, :], weight_y[:, None]
            upper = tables[top, left][block] * (1 - w) + tables[top, right][block] * w
            lower = tables[bottom, left][block] * (1 - w) + tables[bottom, right][block] * w
            out[y, x] = np.rint(upper * (1 - v) + lower * v)
    return out


def _tables(pixels: NDArray[np.uint8], clip_limit: float) -> NDArray[np.float32]:
    """Return the lookup table of each tile: uint8[down, across, pixels] -> float32[down, across, 256]."""
    down, across, count = pixels.shape
    offsets = np.arange(down * across).reshape(down, across, 1) * LEVELS
    histogram = np.bincount((pixels + offsets).ravel(), minlength=down * across * LEVELS).reshape(-1, LEVELS)
    limit = max(1, int(clip_limit * count / LEVELS))
    excess = np.maximum(histogram - limit, 0).sum(axis=1)  # [tiles] the clipped pixels are spread over all levels
    histogram = np.minimum(histogram, limit) + (excess // LEVELS)[:, None]
    for row, rest in zip(histogram, (excess % LEVELS).tolist(), strict=True):
        if rest:
            row[: max(1, LEVELS // rest) * rest : max(1, LEVELS // rest)] += 1
    tables = np.rint(histogram.cumsum(axis=1) * np.float32((LEVELS - 1) / count))
    return tables.clip(0, LEVELS - 1).astype(np.float32).reshape(down, across, LEVELS)


def _bands(size: int, tile: int, count: int) -> Iterator[Band]:
    """Divide an axis of ``size`` pixels at the centres of its ``count`` tiles."""
    position = np.arange(size, dtype=np.float32) / tile - 0.5
    before = np.floor(position).astype(int)
    for index in range(-1, count):
        start, stop = np.searchsorted(before, [index, index + 1])
        if start < stop:
            pixels = slice(int(start), int(stop))
            yield pixels, max(index, 0), min(index + 1, count - 1), (position - before)[pixels].astype(np.float32)
