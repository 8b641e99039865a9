"""Settings of a single image or video in a content list (the keys of qwen-vl-utils), which override the recipe's."""

from typing import Any

from qwenvl_ft.data.conversation import Limits, Sampling
from qwenvl_ft.data.media.reading import Reading, has_image_keys, reading_of
from qwenvl_ft.errors import DataError

IMAGE_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
VIDEO_LIMITS = (*IMAGE_LIMITS, "total_pixels")
COUNTS = {"nframes": "num_frames", "num_frames": "num_frames", "min_frames": "min_frames", "max_frames": "max_frames"}
"""Key -> field of `Sampling` that is a number of frames."""
SECONDS = {"video_start": "start", "video_end": "end"}
"""Key -> field of `Sampling` that is a time in seconds."""


def limits_of(part: dict[str, Any], kind: str, where: str) -> Limits:
    """Read the size limits of a part.

    Args:
        kind: ``image`` or ``video``.

    Raises:
        DataError: an area or a side is not a positive whole number, the limits contradict each other, or an image has
            a setting of videos.
    """
    known = IMAGE_LIMITS if kind == "image" else VIDEO_LIMITS
    for key in ("fps", "sample_fps", "total_pixels", *COUNTS, *SECONDS):
        if kind == "image" and part.get(key) is not None:
            raise DataError(f"{where} is an image with {key}={part[key]!r}, which is a setting of videos. Drop it.")
    limits = {key: _whole_number(part[key], key, where) for key in known if part.get(key) is not None}
    if ("resized_height" in limits) != ("resized_width" in limits):
        raise DataError(f"{where} sets one of resized_height and resized_width. Give both or neither.")
    low, high = limits.get("min_pixels"), limits.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise DataError(f"{where} has min_pixels={low} above max_pixels={high}. Swap them.")
    return Limits(**limits)


def sampling_of(part: dict[str, Any], where: str) -> Sampling:
    """Read the frame sampling of a video part.

    Raises:
        DataError: a count or a time is malformed, or two settings contradict each other.
    """
    fields: dict[str, Any] = {
        name: _whole_number(part[key], key, where) for key, name in COUNTS.items() if part.get(key) is not None
    }
    fields |= {name: _seconds(part[key], key, where) for key, name in SECONDS.items() if part.get(key) is not None}
    if "num_frames" in fields and (part.get("fps") is not None or {"min_frames", "max_frames"} & fields.keys()):
        raise DataError(f"{where} sets nframes and another rule for the number of frames. Keep one.")
    if fields.get("min_frames", 0) > fields.get("max_frames", float("inf")):
        raise DataError(
            f"{where} has min_frames={fields['min_frames']} above max_frames={fields['max_frames']}. Swap them."
        )
    return Sampling(**fields)


def part_reading(part: dict[str, Any], where: str, *, frames: bool = True) -> Reading:
    """Read how the image of a part, or each frame of a list of frames, becomes 8 bits (`IMAGE_KEYS`).

    Args:
        frames: False for a video file, which has no such settings.

    Raises:
        DataError: a value is malformed, or the part is a video file.
    """
    if not frames and has_image_keys(part):
        raise DataError(f"{where} is a video file with a setting of images: high_bit_depth, window or image_frame.")
    return reading_of(part, f"{where}.")


def checked_fps(fps: Any, where: str) -> float | None:
    """Return a rate in frames per second, None if absent.

    Raises:
        DataError: it is not a positive finite number.
    """
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise DataError(f"{where}: fps={fps!r} must be a positive number of frames per second.")
    return float(fps)


def _whole_number(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
        raise DataError(f"{where} has {key}={value!r}. Give a positive whole number.")
    return int(value)


def _seconds(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise DataError(f"{where} has {key}={value!r}. Give seconds from the beginning of the video.")
    return float(value)
