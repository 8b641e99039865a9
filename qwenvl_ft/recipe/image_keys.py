"""Which values may the keys take that say how an image is read? For recipes, data set entries, records and parts."""

import math
from collections.abc import Mapping
from typing import Any

METHODS = ("error", "window", "minmax", "percentile", "clip")
"""Values of ``high_bit_depth``: how values deeper than 8 bits become 8 bits; ``error`` refuses them."""
IMAGE_KEYS = ("high_bit_depth", "window", "image_frame")


def image_keys_fault(entry: Mapping[str, Any], where: str) -> str:
    """Return what is wrong with the `IMAGE_KEYS` of a mapping and how to correct it; empty if nothing is.

    Args:
        where: what the message names before the key, for example ``data.``.
    """
    method, window, frame = (entry.get(key) for key in IMAGE_KEYS)
    if method is not None and method not in METHODS:
        return f"{where}high_bit_depth={method!r:.80} is unknown. Use one of {', '.join(METHODS)}."
    if window is not None and not _is_window(window):
        return f"{where}window={window!r:.80} must be two numbers, the lower first: window: [-160, 240]."
    if window is not None and method not in (None, "window"):
        return (
            f"{where}window={list(window)} has an effect only with {where}high_bit_depth=window, not {method}. "
            "Set that, or remove the window."
        )
    if frame is not None and (isinstance(frame, bool) or not _is_count(frame)):
        return f"{where}image_frame={frame!r:.80} must be the number of a frame, page or slice, counted from 0."
    return ""


def _is_window(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    if any(isinstance(limit, bool) or not isinstance(limit, (int, float)) for limit in value):
        return False
    return all(map(math.isfinite, value)) and value[0] < value[1]


def _is_count(value: Any) -> bool:
    if isinstance(value, str):  # a cell of a table
        return value.isdecimal()
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 and value == int(value)
