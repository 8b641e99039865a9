"""How one medium is shown: the keys of qwen-vl-utils in a part of a content list, instead of the recipe's rule."""

from typing import Any

from qwenvl_ft.data.conversation import Limits, Sampling
from qwenvl_ft.errors import DataError

IMAGE_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
VIDEO_LIMITS = (*IMAGE_LIMITS, "total_pixels")
COUNTS = {"nframes": "num_frames", "num_frames": "num_frames", "min_frames": "min_frames", "max_frames": "max_frames"}
SECONDS = {"video_start": "start", "video_end": "end"}
"""Key -> field of `Sampling`."""


def limits_of(part: dict[str, Any], kind: str, where: str) -> Limits:
    """Raises DataError: an area or a side is not a positive whole number, or they contradict each other."""
    known = IMAGE_LIMITS if kind == "image" else VIDEO_LIMITS
    for key in ("fps", "sample_fps", "total_pixels", *COUNTS, *SECONDS):
        if kind == "image" and part.get(key) is not None:
            raise DataError(f"{where} is an image with {key}={part[key]!r}, which is a setting of videos. Drop it.")
    told = {key: _whole(part[key], key, where) for key in known if part.get(key) is not None}
    if ("resized_height" in told) != ("resized_width" in told):
        raise DataError(f"{where} sets one of resized_height and resized_width. Give both or neither.")
    low, high = told.get("min_pixels"), told.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise DataError(f"{where} has min_pixels={low} above max_pixels={high}. Swap them.")
    return Limits(**told)


def sampling_of(part: dict[str, Any], where: str) -> Sampling:
    """Raises DataError: a count or a time is malformed, or two settings contradict each other."""
    told: dict[str, Any] = {
        name: _whole(part[key], key, where) for key, name in COUNTS.items() if part.get(key) is not None
    }
    told |= {name: _seconds(part[key], key, where) for key, name in SECONDS.items() if part.get(key) is not None}
    if "num_frames" in told and (part.get("fps") is not None or {"min_frames", "max_frames"} & told.keys()):
        raise DataError(f"{where} sets nframes and another rule for the number of frames. Keep one.")
    if told.get("min_frames", 0) > told.get("max_frames", float("inf")):
        raise DataError(
            f"{where} has min_frames={told['min_frames']} above max_frames={told['max_frames']}. Swap them."
        )
    return Sampling(**told)


def _whole(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
        raise DataError(f"{where} has {key}={value!r}. Give a positive whole number.")
    return int(value)


def _seconds(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise DataError(f"{where} has {key}={value!r}. Give seconds from the beginning of the video.")
    return float(value)
