"""COCO detection files: a .json object with ``images``, ``annotations`` and ``categories`` -> one record per image.

The file is read as a stream, once, by the process that copies it to Arrow. The records keep the file's order; their
form is described in readers/coco.py.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.data.record_size import too_large, utf8_bytes
from qwenvl_ft.data.sources.json_files import MAX_BYTES, Entry, read_members
from qwenvl_ft.errors import DataError

CROWD, NO_AREA = "regions of crowds", "boxes without area in the image"
log = logging.getLogger("qwenvl_ft.data")


def read_coco(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[Entry]:
    """Yield (place, JSON) of one record per image; an error for one of more than ``max_bytes``.

    Crowd regions, which cover several objects, and boxes without area inside the image are left out; their numbers
    are logged.

    Raises:
        DataError: the file is not a COCO detection file, or an entry is malformed.
    """
    detections = _Detections(path, max_bytes)
    categories = list(detections.names.values())
    for number, image in enumerate(detections.images):
        record = image | {"categories": categories, "objects": detections.objects(image)}
        place, text = f":images[{number}]", json.dumps(record, ensure_ascii=False)
        size = utf8_bytes(text, max_bytes)
        yield place, too_large(f"{path}{place}", size, max_bytes) if size > max_bytes else text
    for reason, count in detections.left_out.items():
        log.warning("%s: left out %d %s", path, count, reason)


class _Detections:
    """The content of a file without its masks: a few numbers per annotation."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.images: list[dict[str, Any]] = []
        self.names: dict[Any, str] = {}
        """Category id -> name."""
        self.boxes: dict[Any, list[tuple[Any, list[float], str]]] = defaultdict(list)
        """Image id -> (category id, [x, y, width, height], place in the file)."""
        self.left_out: Counter[str] = Counter()
        self._read()
        self._check()

    def objects(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the boxes of an image as corners, clipped to the image."""
        width, height = image["width"], image["height"]
        inside = []
        for category, (x, y, w, h), _ in self.boxes.get(image["id"], []):
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if x1 < x2 and y1 < y2:
                inside.append({"desc": self.names[category], "bbox_2d": [x1, y1, x2, y2]})
            else:
                self.left_out[NO_AREA] += 1
        return inside

    def _read(self) -> None:
        parts = {"images": self._image, "annotations": self._annotation, "categories": self._category}
        seen = []
        for key, texts in read_members(self.path, self.max_bytes):
            seen.append(key)
            for number, text in enumerate(texts):
                if key in parts:
                    parts[key](_object(text, where := f"{self.path}:{key}[{number}]"), where)
        if missing := [part for part in parts if part not in seen]:
            raise DataError(
                f"{self.path}: a .json file holds a list of records, or COCO's {', '.join(parts)}; this holds a dict "
                f"of {', '.join(seen)[:80] or 'nothing'}, without {missing[0]}."
            )

    def _check(self) -> None:
        known = {image["id"] for image in self.images}
        if len(known) < len(self.images):
            raise DataError(f"{self.path}: {len(self.images) - len(known)} images have the same id as another image.")
        for image, boxes in self.boxes.items():
            for category, _, where in boxes:
                if image not in known:
                    raise DataError(f"{where} has image_id={image!r}, which no image has.")
                if category not in self.names:
                    raise DataError(f"{where} has category_id={category!r}, which no category has.")

    def _image(self, entry: dict[str, Any], where: str) -> None:
        for key in ("id", "file_name", "width", "height"):
            if entry.get(key) is None:
                raise DataError(f"{where} has no {key!r}.")
        self.images.append({key: entry[key] for key in ("id", "width", "height")} | {"images": [entry["file_name"]]})

    def _annotation(self, entry: dict[str, Any], where: str) -> None:
        if entry.get("iscrowd"):
            self.left_out[CROWD] += 1
            return
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(f"{where} has bbox={box!r:.80}; it must be [x, y, width, height] in pixels.")
        self.boxes[entry.get("image_id")].append((entry.get("category_id"), box, where))

    def _category(self, entry: dict[str, Any], where: str) -> None:
        if not isinstance(entry.get("name"), str) or entry.get("id") is None:
            raise DataError(f"{where} must be {{'id': ..., 'name': ...}}, not {entry!r:.80}.")
        self.names[entry["id"]] = entry["name"]


def _object(text: str, where: str) -> dict[str, Any]:
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object, not {text:.80}.")
    return entry
