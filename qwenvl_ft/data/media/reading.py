"""How is one image read from its file: which frame, and how do values deeper than 8 bits become 8 bits?

The settings come from the recipe (``data``), the data set's entry, the record, or a part of a content list; the more
specific one decides. A setting that is not the recipe's travels with the image's value, as `ReadAs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS, image_keys_fault

DEPTH_KEYS = ("high_bit_depth", "window")
ERROR, WINDOW = "error", "window"


@dataclass(frozen=True, slots=True)
class Reading:
    """Settings of reading an image; None leaves a setting to the less specific level."""

    high_bit_depth: str | None = None
    """One of `METHODS`."""
    window: tuple[float, float] | None = None
    """Lowest and highest value of the method ``window``; None takes the window that the file states."""
    image_frame: int | None = None
    """Frame, page or slice of a file with several, from 0; None takes the first, and says so."""

    def over(self, base: "Reading") -> "Reading":
        """Return these settings, completed by less specific ones."""
        frame = base.image_frame if self.image_frame is None else self.image_frame
        if self.high_bit_depth is None:
            return Reading(base.high_bit_depth, base.window, frame)
        keeps = self.window is None and self.high_bit_depth == base.high_bit_depth
        return Reading(self.high_bit_depth, base.window if keeps else self.window, frame)

    def keys(self) -> dict[str, Any]:
        """Return the settings of depth as keys of a record."""
        window = {} if self.window is None else {"window": list(self.window)}
        return {"high_bit_depth": self.high_bit_depth, **window}

    def __str__(self) -> str:
        """Return the method, with its window: ``window -160 to 240``."""
        limits = "" if self.window is None else f" {self.window[0]:g} to {self.window[1]:g}"
        return f"{self.high_bit_depth or ERROR}{limits}"


def lacks_window(reading: Reading) -> bool:
    """Return True if the method needs a window, and only a file can give it."""
    return reading.high_bit_depth == WINDOW and reading.window is None


REFUSING = Reading(ERROR)
"""The default: values deeper than 8 bits are an error."""
SIZE_ONLY = Reading("clip")
"""For code that asks only for an image's size, which no method changes."""


@dataclass(frozen=True, slots=True)
class ReadAs:
    """The value of an image, with settings of its own."""

    value: Any
    """Path, URL, bytes or PIL image."""
    reading: Reading


def reading_of(entry: Mapping[str, Any], where: str) -> Reading:
    """Read the settings among the keys of a recipe section, an entry, a record or a part.

    A ``window`` without ``high_bit_depth`` means the method ``window``.

    Raises:
        DataError: a value is malformed, or both contradict each other.
    """
    if fault := image_keys_fault(entry, where):
        raise DataError(fault)
    method, window, frame = (entry.get(key) for key in IMAGE_KEYS)
    if window is None:
        return Reading(method, None, None if frame is None else int(frame))
    return Reading(WINDOW, (float(window[0]), float(window[1])), None if frame is None else int(frame))


def image_keys_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image keys that a data set's entry sets."""
    return {key: entry[key] for key in IMAGE_KEYS if entry.get(key) is not None}


def has_image_keys(entry: Mapping[str, Any]) -> bool:
    """Return True if a mapping has one of `IMAGE_KEYS`."""
    return any(entry.get(key) is not None for key in IMAGE_KEYS)


def read_as(value: Any, reading: Reading) -> Any:
    """Return an image's value with settings; those that it already has are more specific and remain."""
    if reading == Reading():
        return value
    return ReadAs(value.value, value.reading.over(reading)) if isinstance(value, ReadAs) else ReadAs(value, reading)


def with_defaults(record: Any, defaults: Mapping[str, Any]) -> Any:
    """Return a record with the image keys of its data set where it has none of its own.

    ``high_bit_depth`` and ``window`` belong together: a record with one of them takes neither from its data set.
    """
    if not defaults or not isinstance(record, dict):
        return record
    own_depth = any(record.get(key) is not None for key in DEPTH_KEYS)
    added = {
        key: value
        for key, value in defaults.items()
        if record.get(key) is None and not (own_depth and key in DEPTH_KEYS)
    }
    return {**record, **added}


def saved_reading(processor: Any) -> Reading:
    """Return the setting that was saved with a model's processor; `REFUSING` if it has none."""
    images = getattr(processor, "image_processor", None)
    entry = {key: getattr(images, key, None) for key in DEPTH_KEYS}
    return reading_of(entry, "preprocessor: ").over(REFUSING)


def save_reading(processor: Any, reading: Reading) -> None:
    """Write the setting into a processor, whose ``save_pretrained`` keeps it; `REFUSING` removes an older one."""
    window = None if reading.window is None else list(reading.window)
    for key, value in zip(DEPTH_KEYS, (reading.high_bit_depth, window), strict=True):
        if reading.high_bit_depth not in (None, ERROR) and value is not None:
            setattr(processor.image_processor, key, value)
        elif hasattr(processor.image_processor, key):
            delattr(processor.image_processor, key)


def without_reading(settings: dict[str, Any]) -> dict[str, Any]:
    """Return an image processor's settings without what `save_reading` wrote, which does not change a size."""
    return {key: value for key, value in settings.items() if key not in DEPTH_KEYS}
