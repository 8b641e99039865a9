"""Refuses media that are too large to open or too thin to resize; the errors name the size and the ways out."""

from typing import Any

from qwenvl_ft.errors import DataError

MAX_ASPECT = 200
"""Largest ratio of two sides that the processors resize (`image_size` of upstream/processors.py)."""
SKIP = "or set data.on_error=skip to leave such records out"


class TooLarge(DataError):
    """A stored image or frame has more pixels than ``data.max_image_pixels``."""


class TooThin(DataError):
    """One side of an image or frame is more than `MAX_ASPECT` times the other, which the processor refuses."""


def require_area(what: str, width: int, height: int, limit: int) -> None:
    """Raise TooLarge for a stored medium of more than ``limit`` pixels.

    Args:
        what: kind and name of the medium, for the message.
    """
    if width * height > limit:
        raise TooLarge(
            f"{what} has {width} x {height} = {width * height} pixels, above "
            f"data.max_image_pixels={limit}. Shrink the file, raise the limit, {SKIP}."
        )


def too_thin(what: str, width: int, height: int, remedy: str = "Crop or pad it") -> TooThin:
    """Return the error for a medium whose size the processor refuses."""
    longer, shorter = max(width, height), min(width, height)
    return TooThin(
        f"{what} has {width} x {height} pixels (width x height): one side is {longer / shorter:.4g} times the other, "
        f"and the processor takes at most {MAX_ASPECT} times. {remedy}, drop the record, {SKIP}."
    )


def no_videos(source: Any, processor: object) -> DataError:
    """Return the error for a video that a model without rules for videos would have to see.

    Qwen2-VL and Qwen2.5-VL have such rules, but each version of transformers has others: which frames are sampled, how
    many pixels they have, and which positions in time they and the text after them get.
    """
    return DataError(
        f"{source}: videos need a Qwen3-VL processor, not {type(processor).__name__}: how Qwen2-VL and Qwen2.5-VL see "
        "videos depends on the version of transformers. Give single frames as images, train Qwen3-VL or Qwen3.5, "
        f"{SKIP}."
    )
