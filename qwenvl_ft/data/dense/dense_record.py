"""Dense-caption records: the format, and its checks, whose errors name the record, the object and the number.

```json
{"images": ["rack.jpg"], "width": 1200, "height": 800, "summary": "switch/vendorA×1",
 "objects": [{"desc": "switch/vendorA", "bbox_2d": [90, 120, 420, 360]}]}
```
An object has a ``desc`` and one geometry in pixels of the stored image: ``bbox_2d`` (x1, y1, x2, y2), ``quad`` (four
corners) or ``line`` (two points or more; ``line_points`` may state how many).
"""

# ruff: noqa: RUF002 - Chinese punctuation

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from qwenvl_ft.data.augment.geometry import SHAPES, area
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.media.elsewhere import OutsideRootError
from qwenvl_ft.data.media.images import resolve_path, unpack_arrow
from qwenvl_ft.data.media.reading import read_as, reading_of
from qwenvl_ft.data.unread import Unread, once, unread_keys
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS

KEYS = {"images", "objects", "width", "height", "summary", "id", "categories", *IMAGE_KEYS}
"""Keys of a record that are read; ``categories`` by readers/coco.py."""
OBJECT_KEYS = {"desc", "line_points", *SHAPES}
REQUIRED = ("images", "objects", "width", "height")
HUGE = 1e9
"""Pixels; coordinates must be smaller, which rejects infinity and NaN too."""
TOLERANCE_PIXELS = 1.0
"""Largest distance of a coordinate from the image; annotation tools round outwards. Answers are clamped."""


class GeometryError(DataError):
    """Coordinates are missing, malformed or outside their image."""


@dataclass(frozen=True)
class DenseRecord:
    """One checked record; relative image paths are resolved."""

    images: tuple[Any, ...]
    """Path, URL, bytes or PIL image of each; all images have the record's size and share its objects."""
    objects: tuple[dict[str, Any], ...]
    """``desc`` and one geometry each."""
    width: int
    height: int
    summary: Any
    """Unchecked value of the file; `require_summary` checks it where it is used."""
    source: Source
    unread: tuple[Unread, ...] = field(default=(), compare=False)
    """Keys of the record and its objects that hold something and are read by nothing."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height


def matches(record: Mapping[str, Any]) -> bool:
    """Return True if a record has this format, judging by its keys."""
    others = ("conversations", "messages")
    return isinstance(record.get("objects"), list) and all(record.get(key) is None for key in others)


def read_dense_record(record: Any, source: Source, media_root: str | Path | None = None) -> DenseRecord:
    """Check a record.

    Raises:
        DataError: a key is missing, or a value is invalid. The message names the record, the object, the key and the
            value.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{source}: a record must be a JSON object, not a {type(record).__name__}.")
    for key in REQUIRED:
        if record.get(key) is None:
            raise DataError(f"{source}: no {key!r}. A dense-caption record needs {', '.join(REQUIRED)}.")
    width, height = (_side(record[key], key, source) for key in ("width", "height"))
    entries = record["objects"]
    if not isinstance(entries, (list, tuple)):
        raise DataError(f"{source}: objects={entries!r:.80} must be a list; an empty one for an image without objects.")
    objects = tuple(read_object(entry, f"{source}: objects[{k}]", width, height) for k, entry in enumerate(entries))
    reading = reading_of(record, f"{source}: ")
    images = tuple(read_as(image, reading) for image in _images(record["images"], source, media_root))
    unread = unread_keys(record, KEYS, source)
    for entry in entries:
        unread += unread_keys(entry, OBJECT_KEYS, source, "objects[].", meanings=())
    return DenseRecord(images, objects, width, height, record.get("summary"), source, once(unread))


def geometry_of(entry: Mapping[str, Any]) -> str:
    """Return the key of a checked object's geometry."""
    return next(key for key in SHAPES if key in entry)


def _side(value: Any, key: str, source: Source) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < HUGE or value % 1:
        raise DataError(f"{source}: {key}={value!r:.80} must be the stored image's {key} in pixels, 1 or more.")
    return int(value)


def _images(value: Any, source: Source, media_root: str | Path | None) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{source}: images={value!r:.80} must be a list with at least one image.")
    return tuple(_image(image, f"{source}: images[{k}]", media_root) for k, image in enumerate(value))


def _image(value: Any, where: str, media_root: str | Path | None) -> Any:
    value = unpack_arrow(value)
    if not isinstance(value, (str, bytes, PILImage.Image)) or value in ("", b""):
        raise DataError(f"{where}={value!r:.80} is not an image. Give a path, a data: URI, bytes or a PIL image.")
    try:
        return resolve_path(value, media_root)
    except OutsideRootError as error:
        raise DataError(f"{where}: {error}") from None


def read_object(entry: Any, where: str, width: int, height: int) -> dict[str, Any]:
    """Check an object and return its ``desc`` and its geometry.

    Args:
        where: record and object, for messages.
        width, height: size of the image in pixels.

    Raises:
        GeometryError: the coordinates are missing, malformed or outside the image.
        DataError: anything else is malformed.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}={entry!r:.80} must be an object with a desc and a geometry.")
    desc = entry.get("desc")
    if not isinstance(desc, str) or not desc.strip():
        raise DataError(f"{where}.desc={desc!r:.80} must be a text. Write what the object is: 'type/attribute'.")
    keys = [key for key in SHAPES if entry.get(key) is not None]
    if len(keys) != 1:
        found = " and ".join(keys) or f"no geometry among {', '.join(map(str, entry))}"
        raise GeometryError(f"{where} has {found}; it needs exactly one of {', '.join(SHAPES)}.")
    values = _numbers(entry[keys[0]], f"{where}.{keys[0]}", keys[0])
    if fault := FAULTS[keys[0]](values):
        raise GeometryError(f"{where}.{keys[0]}={values}: {fault}")
    _check_inside(values, f"{where}.{keys[0]}", width, height)
    _check_points(entry, where, keys[0], values)
    return {"desc": desc, keys[0]: values}


def _numbers(values: Any, where: str, key: str) -> list[int | float]:
    shape = SHAPES[key]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise GeometryError(f"{where}={values!r:.80} must be a flat list of {shape.counts} numbers.")
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -HUGE < value < HUGE:
            raise GeometryError(f"{where}[{place}]={value!r:.80} must be a finite number: pixels in a flat list.")
    if not shape.is_count(len(values)):
        raise GeometryError(f"{where}={list(values)!r:.80} has {len(values)} numbers, but needs {shape.counts}.")
    return list(values)


def _check_inside(values: Sequence[float], where: str, width: int, height: int) -> None:
    for place, value in enumerate(values):
        name, side, limit = (("x", "width", width), ("y", "height", height))[place % 2]
        if not -TOLERANCE_PIXELS <= value <= limit + TOLERANCE_PIXELS:
            raise GeometryError(
                f"{where}[{place}]={value:g} is outside the image: {name} goes from 0 to {side}={limit}. Coordinates "
                "are pixels of the stored image; clip the object, or correct width and height."
            )


def _check_points(entry: Mapping[str, Any], where: str, key: str, values: Sequence[float]) -> None:
    line_points = entry.get("line_points")
    if line_points is None:
        return
    if key != "line":
        raise GeometryError(
            f"{where}.line_points={line_points!r:.80} is only allowed with line, but this object has {key}. "
            "Remove line_points."
        )
    if line_points != len(values) // 2:
        raise GeometryError(
            f"{where}.line_points={line_points!r:.80}, but line has {len(values)} numbers, {len(values) // 2} points. "
            "Correct or remove it."
        )


def _box_fault(values: Sequence[float]) -> str:
    x1, y1, x2, y2 = values
    for axis, low, high in (("x", x1, x2), ("y", y1, y2)):
        if not low < high:
            return (
                f"{axis}1={low:g} is not less than {axis}2={high:g}. Write the top left corner, then the bottom right."
            )
    return ""


def _quad_fault(values: Sequence[float]) -> str:
    if area(list(zip(values[::2], values[1::2], strict=True))) > 0:
        return ""
    return "the quad has no area. Write four corners one after the other around the object, from the top left."


def _line_fault(values: Sequence[float]) -> str:
    if len(set(zip(values[::2], values[1::2], strict=True))) > 1:
        return ""
    return "all points of the line are the same. Write at least two different ones."


FAULTS: dict[str, Callable[[Sequence[float]], str]] = {
    "bbox_2d": _box_fault,
    "quad": _quad_fault,
    "line": _line_fault,
}
"""Key of a geometry -> function that returns what is wrong with its numbers and how to fix it, or ""."""
