"""Computes the M-RoPE positions (time, height, width) of every token, without a loop over tokens.

Letters in shapes: D draft tokens, with one placeholder per image or pair of video frames; L tokens after expansion.
"""

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


def mrope_positions(counts: Int, widths: Int) -> Int:
    """Compute the positions of the expanded sequence.

    Text advances by one on all three axes. A placeholder becomes a grid of ``count`` tokens, ``width`` per line, all at
    the same time position; the next token starts after the grid's longer side. Equal to ``get_rope_index`` of
    transformers' Qwen3-VL, where each frame pair of a video is a grid and its time is text.

    Args:
        counts: int64[D], tokens that each draft token becomes; 1 for text.
        widths: int64[D], tokens in one line of its grid; 0 for text.

    Returns:
        int64[3, L] as (time, height, width).

    Example:
        Two text tokens, a 2 x 3 grid, one text token: counts ``[1, 1, 6, 1]``, widths ``[0, 0, 3, 0]`` give
        height ``[0, 1, 2, 2, 2, 3, 3, 3, 5]`` and width ``[0, 1, 2, 3, 4, 2, 3, 4, 5]``.
    """
    is_grid = widths > 0
    width = np.maximum(widths, 1)
    advance = np.where(is_grid, np.maximum(counts // width, widths), 1)
    start = np.cumsum(advance) - advance  # [D]
    first = np.cumsum(counts) - counts  # [D] index of each draft token's first token
    inside = np.arange(counts.sum()) - np.repeat(first, counts)  # [L]
    line = np.repeat(width, counts)
    grid = np.repeat(is_grid, counts)
    base = np.repeat(start, counts)
    return np.stack([base, base + np.where(grid, inside // line, 0), base + np.where(grid, inside % line, 0)])
