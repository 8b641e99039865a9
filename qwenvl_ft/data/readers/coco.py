"""One image's record of a COCO detection file (sources/coco_files.py): asks for all objects.

A record has the keys of a dense-caption record and the names of all categories:

```json
{"id": 7, "images": ["a.jpg"], "width": 640, "height": 480, "categories": ["cat", "dog"],
 "objects": [{"desc": "dog", "bbox_2d": [12.5, 40, 200, 310.2]}]}
```
The answer lists the boxes as Qwen3-VL writes them: ``[{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}]`` in 0..1000 of
the image's sides, from top to bottom. With ``reader: dense`` the same records are dense captions.
"""

import json
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Message, Source, Text
from qwenvl_ft.data.dense.compose import scaled_coordinates
from qwenvl_ft.data.dense.dense_record import read_dense_record

PROMPT = (
    "Find every object of these categories: {categories}. Answer with a JSON list of "
    '{{"bbox_2d": [x1, y1, x2, y2], "label": category}}, coordinates from 0 to 1000, from the top down.'
)


def matches(record: dict[str, Any]) -> bool:
    return isinstance(record.get("objects"), list) and isinstance(record.get("categories"), list)


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Return the question about all categories and the answer with all boxes.

    Raises:
        DataError: an object or the size is malformed.
    """
    checked = read_dense_record(record, source, media_root)
    boxes = [
        (scaled_coordinates(entry["bbox_2d"], checked.size, "norm1000"), entry["desc"]) for entry in checked.objects
    ]
    answer = [{"bbox_2d": box, "label": label} for box, label in sorted(boxes, key=lambda b: (b[0][1], b[0][0]))]
    question = PROMPT.format(categories=", ".join(record["categories"]))
    return Conversation(
        (
            Message("user", (*(Image(image) for image in checked.images), Text(question))),
            Message("assistant", (Text(json.dumps(answer, ensure_ascii=False)),)),
        ),
        source,
        unread=checked.unread,
    )
