"""Detection sets in COCO's form: a .json file with ``images``, ``annotations`` and ``categories``.

The file becomes one record per image, in the file's order; it is read as a stream, once, by the process that copies it
to Arrow. A record has the keys of a dense-caption record and the names of all categories:

```json
{"id": 7, "images": ["a.jpg"], "width": 640, "height": 480, "categories": ["cat", "dog"],
 "objects": [{"desc": "dog", "bbox_2d": [12.5, 40, 200, 310.2]}]}
```
and asks for all objects as Qwen3-VL writes boxes: ``[{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}]`` in 0..1000 of the
image's sides, from the top down. With ``reader: dense`` the same records are dense captions.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Message, Source, Text
from qwenvl_ft.data.dense.compose import emitted
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.readers.json_text import read_members
from qwenvl_ft.errors import DataError

PROMPT = (
    "Find every object of these categories: {categories}. Answer with a JSON list of "
    '{{"bbox_2d": [x1, y1, x2, y2], "label": category}}, coordinates from 0 to 1000, from the top down.'
)
CROWD, NO_AREA = "regions of crowds", "boxes without area in the image"
log = logging.getLogger("qwenvl_ft.data")


def matches(record: dict[str, Any]) -> bool:
    return isinstance(record.get("objects"), list) and isinstance(record.get("categories"), list)


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Raises DataError: an object or the size is malformed."""
    told = read_dense_record(record, source, media_root)
    boxes = [(emitted(entry["bbox_2d"], told.size, "norm1000"), entry["desc"]) for entry in told.objects]
    answer = [{"bbox_2d": box, "label": label} for box, label in sorted(boxes, key=lambda b: (b[0][1], b[0][0]))]
    question = PROMPT.format(categories=", ".join(record["categories"]))
    return Conversation(
        (
            Message("user", (*(Image(image) for image in told.images), Text(question))),
            Message("assistant", (Text(json.dumps(answer, ensure_ascii=False)),)),
        ),
        source,
    )


def read_coco(path: Path) -> Iterator[tuple[str, str]]:
    """(place, JSON) of one record per image.

    Crowd regions, which are no single object, and boxes that have no area within the image are left out; how many is
    logged.

    Raises:
        DataError: the file is no such set, or an entry of it is malformed.
    """
    told = _Detections(path)
    categories = list(told.names.values())
    for number, image in enumerate(told.images):
        record = image | {"categories": categories, "objects": told.objects(image)}
        yield f":images[{number}]", json.dumps(record, ensure_ascii=False)
    for reason, count in told.left_out.items():
        log.warning("%s: left out %d %s", path, count, reason)


class _Detections:
    """What a file holds, without its masks: a few numbers per annotation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: list[dict[str, Any]] = []
        self.names: dict[Any, str] = {}
        """Category id -> name."""
        self.boxes: dict[Any, list[tuple[Any, list[float], str]]] = defaultdict(list)
        """Image id -> (category id, [x, y, width, height], where it stands)."""
        self.left_out: Counter[str] = Counter()
        self._read()
        self._check()

    def objects(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The boxes of an image as corners within it."""
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
        for key, texts in read_members(self.path):
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
            raise DataError(f"{self.path}: {len(self.images) - len(known)} images have the id of another one.")
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
        told = {key: entry[key] for key in ("id", "width", "height")}
        self.images.append(told | {"images": [entry["file_name"]]})

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
            raise DataError(f"{where} must be {{'id': ..., 'name': ...}}, it is {entry!r:.80}.")
        self.names[entry["id"]] = entry["name"]


def _object(text: str, where: str) -> dict[str, Any]:
    told = json.loads(text)
    if not isinstance(told, dict):
        raise DataError(f"{where} must be an object, it is {text:.80}.")
    return told
