"""ms-swift's grounding data sets, whose texts refer to objects and boxes by tags.

```json
{"images": ["a.png"], "messages": [{"role": "user", "content": "<image>Find the <ref-object>."},
                                   {"role": "assistant", "content": "<bbox><bbox>"}],
 "objects": {"ref": ["sheep"], "bbox": [[90, 160, 135, 212], [360, 480, 495, 532]]}}
```
Each ``<ref-object>`` and ``<bbox>`` tag takes the next entry of ``ref`` or ``bbox``. A box (4 numbers) or point (2) is
in pixels of the stored image unless ``bbox_type`` is ``norm1`` or ``norm1000``; the text gets it as Qwen3-VL writes it,
``[x1, y1, x2, y2]`` in 0..1000. ``image_id`` gives the image of each box. With ``width`` and ``height`` (lists with one
entry per image) the image files are not opened.
"""

import re
from collections.abc import Callable
from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.compose import scaled_coordinates
from qwenvl_ft.data.dense.dense_record import TOLERANCE_PIXELS, GeometryError
from qwenvl_ft.data.media.elsewhere import OutsideRootError
from qwenvl_ft.data.media.images import MediaPolicy, image_size, resolve_path, unpack_arrow
from qwenvl_ft.data.media.reading import SIZE_ONLY, Reading, read_as, reading_of
from qwenvl_ft.data.readers.messages import kind_of, value_of
from qwenvl_ft.errors import DataError, hint

TAGS = re.compile(r"<ref-object>|<bbox>")
SIZES: dict[str, tuple[float, float] | None] = {"real": None, "norm1": (1.0, 1.0), "norm1000": (1000.0, 1000.0)}
"""``bbox_type`` -> (width, height) that coordinates are relative to; None is the image's size in pixels."""
LISTS = {"messages": "content", "conversations": "value"}
"""Key of the list of turns -> key of a turn's text."""
KEYS = ("ref", "bbox", "bbox_type", "image_id", "width", "height")


def matches(record: dict[str, Any]) -> bool:
    objects = record.get("objects")
    if not isinstance(objects, dict) or not {"ref", "bbox"} & objects.keys():
        return False
    return any(isinstance(record.get(key), list) for key in LISTS)


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """Return the record with its tags replaced by text, without ``objects``.

    Raises:
        DataError: tags and entries differ in number, or a box is malformed or outside its image.
    """
    objects = record["objects"]
    for key in objects.keys() - set(KEYS):
        raise DataError(f"{source}: objects has the unknown key {key!r}.{hint(key, KEYS)}")
    texts = {"<ref-object>": _refs(objects, source), "<bbox>": _boxes(record, objects, source, media_root)}
    remaining = {tag: iter(entries) for tag, entries in texts.items()}

    def replacement(tag: re.Match[str]) -> str:
        text = next(remaining[tag[0]], None)
        if text is None:
            raise DataError(f"{source}: more {tag[0]} tags than entries ({len(texts[tag[0]])}) in objects.")
        return text

    key = next(key for key in LISTS if isinstance(record.get(key), list))
    turns = [_with_tags_replaced(turn, LISTS[key], replacement) for turn in record[key]]
    for tag, entries in remaining.items():
        if unused := len(list(entries)):
            raise DataError(f"{source}: {unused} of {len(texts[tag])} entries in objects have no {tag} tag.")
    return {name: value for name, value in record.items() if name != "objects"} | {key: turns}


def _with_tags_replaced(turn: Any, key: str, replacement: Callable[[re.Match[str]], str]) -> Any:
    """Return a turn with the tags replaced in its text, or in the texts of its parts."""
    if not isinstance(turn, dict):
        return turn
    content = turn.get(key)
    if isinstance(content, str):
        return turn | {key: TAGS.sub(replacement, content)}
    if isinstance(content, list):
        return turn | {key: [_with_tags_replaced(part, _text_key(part), replacement) for part in content]}
    return turn


def _text_key(part: Any) -> str:
    return "value" if isinstance(part, dict) and "value" in part else "text"


def _refs(objects: dict[str, Any], source: Source) -> list[str]:
    refs = objects.get("ref") or []
    if not isinstance(refs, list) or not all(isinstance(ref, str) for ref in refs):
        raise DataError(f"{source}: objects.ref must be a list of texts, not {refs!r:.80}.")
    return refs


def _boxes(record: dict[str, Any], objects: dict[str, Any], source: Source, media_root: str | None) -> list[str]:
    kind = objects.get("bbox_type") or "real"
    if kind not in SIZES:
        raise DataError(f"{source}: objects.bbox_type={kind!r}.{hint(str(kind), SIZES)}")
    boxes = objects.get("bbox") or []
    if not isinstance(boxes, list):
        raise DataError(f"{source}: objects.bbox must be a list of boxes, not {boxes!r:.80}.")
    images = _images(record)
    owners = objects.get("image_id") or [0] * len(boxes)
    if not isinstance(owners, list) or len(owners) != len(boxes):
        raise DataError(
            f"{source}: objects.image_id={owners!r:.80} must hold one image index for each of the {len(boxes)} boxes."
        )
    if kind == "real" and boxes and len(images) > 1 and not objects.get("image_id"):
        raise DataError(
            f"{source}: there are {len(images)} images. Give objects.image_id: which image each box belongs to."
        )
    texts = []
    frame = Reading(image_frame=reading_of(record, f"{source}: ").image_frame)
    for number, (box, owner) in enumerate(zip(boxes, owners, strict=True)):
        where = f"{source}: objects.bbox[{number}]={box!r:.80}"
        size = SIZES[kind] or _size(images, objects, owner, f"{source}: objects.bbox[{number}]", media_root, frame)
        _check(box, size, TOLERANCE_PIXELS if kind == "real" else 0.0, where)
        texts.append(str(scaled_coordinates(box, size, "norm1000")))  # type: ignore[arg-type]
    return texts


def _check(box: Any, size: tuple[float, float], tolerance: float, where: str) -> None:
    if not isinstance(box, list) or len(box) not in (2, 4) or not all(type(v) in (int, float) for v in box):
        raise GeometryError(f"{where} must be [x1, y1, x2, y2] or a point [x, y].")
    for place, value in enumerate(box):
        if not -tolerance <= value <= size[place % 2] + tolerance:
            axis = "xy"[place % 2]
            raise GeometryError(
                f"{where} is outside: {axis} goes from 0 to {size[place % 2]:g}. Check objects.bbox_type."
            )
    if len(box) == 4 and not (box[0] < box[2] and box[1] < box[3]):
        raise GeometryError(f"{where} has no area. Write the top left corner, then the bottom right.")


def _images(record: dict[str, Any]) -> list[Any]:
    """Return the record's images: its ``images`` or ``image``, or else the image parts of its messages."""
    images = record.get("images") or record.get("image")
    if images:
        return list(images) if isinstance(images, (list, tuple)) else [images]
    contents = [turn.get("content") for turn in record.get("messages") or [] if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    values = (value_of(part, kind) for part in parts if (kind := kind_of(part)) in ("image", "image_url"))
    return [value for value in values if value is not None]


def _size(
    images: list[Any], objects: dict[str, Any], owner: Any, where: str, media_root: str | None, frame: Reading
) -> tuple[float, float]:
    """Return the (width, height) in pixels of the image that a box belongs to."""
    if type(owner) is not int or not 0 <= owner < len(images):
        raise DataError(f"{where} has image_id={owner!r}, but there are {len(images)} images, counted from 0.")
    widths, heights = objects.get("width"), objects.get("height")
    if isinstance(widths, list) and isinstance(heights, list) and len(widths) == len(heights) == len(images):
        return float(widths[owner]), float(heights[owner])
    if widths or heights:
        raise DataError(f"{where}: objects.width and objects.height must be lists of {len(images)}, one per image.")
    try:
        image = read_as(resolve_path(unpack_arrow(images[owner]), media_root), frame)
        height, width = image_size(image, MediaPolicy(reading=SIZE_ONLY))
    except OutsideRootError:
        raise
    except DataError as error:
        raise DataError(f"{where}: {error} Or give objects.width and objects.height.") from None
    return float(width), float(height)
