"""Join the records of a group into one conversation: their images, one question, and one JSON object as the answer.

```
system  ...                                      (per mode)
user    图片_1: <image>图片_2: <image>List every object in each picture.
assistant {"图片_1": {"object_1": {"desc": "switch/vendorA", "bbox_2d": [75, 150, 350, 450]}}, "图片_2": {...}}
```
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image as PILImage

from qwenvl_ft.data.augment.pipeline import Drawn
from qwenvl_ft.data.conversation import Conversation, Image, Message, Part, Source, Text
from qwenvl_ft.data.dense.dense_record import DenseRecord, geometry_of
from qwenvl_ft.data.dense.options import SCALES, DenseOptions
from qwenvl_ft.data.dense.prompts import MODES, SUMMARY
from qwenvl_ft.data.dense.summary import build_summary, require_summary
from qwenvl_ft.data.media.images import MediaPolicy, image_size, medium_name, open_image
from qwenvl_ft.errors import DataError, unknown_name

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class DenseImage:
    """An image of a record. It is augmented when it is opened; its final size follows from its header.

    `size` and `open` raise DataError if the file's size differs from the record's: every coordinate would be wrong.
    """

    value: Any
    """Path, URL, bytes or PIL image."""
    stated: Size
    """Size according to the record."""
    drawn: Drawn | None = None
    policy: MediaPolicy = field(default_factory=MediaPolicy)

    def size(self) -> tuple[int, int]:
        """Return the (height, width) of the image that `open` returns, without decoding pixels."""
        height, width = image_size(self.value, self.policy)
        self._check((width, height))
        width, height = self.stated if self.drawn is None else self.drawn.size
        return height, width

    def open(self) -> PILImage.Image:
        """Decode and augment the image."""
        image = open_image(self.value, self.policy)
        self._check(image.size)
        return image if self.drawn is None else self.drawn.image(image)

    def _check(self, found: Size) -> None:
        if found != self.stated:
            raise DataError(
                f"image {medium_name(self.value)} is {found[0]} x {found[1]} pixels, but its record states "
                f"width={self.stated[0]}, height={self.stated[1]}. Correct the record; "
                "images that share objects must have one size."
            )


@dataclass(frozen=True, slots=True)
class AugmentedRecord:
    """A record's objects, size and summary after augmentation."""

    objects: Sequence[Mapping[str, Any]]
    size: Size
    summary: str | None
    """Rebuilt because objects left the frame; None if the record's own summary still holds."""
    drawn: Drawn | None
    """None if the record stays unchanged."""


def dense_conversation(
    records: Sequence[DenseRecord],
    options: DenseOptions,
    mode: str = "dense",
    *,
    drawn: Sequence[Drawn | None] | None = None,
    policy: MediaPolicy | None = None,
) -> Conversation:
    """Join the records of a group into one conversation.

    Every image follows the label of its record, so that the labels in the question are the keys of the answer, also if
    a record has several images.

    Args:
        mode: ``dense`` asks for objects, ``summary`` for one line about each picture.
        drawn: the augmentation of each record; None leaves all unchanged. An augmentation that would move all objects
            of a record out of the frame is not applied to it. If some objects leave the frame, the summary is rebuilt
            from the remaining ones.

    Raises:
        DataError: the mode is ``summary`` and a summary is missing or malformed.
        RecipeError: the mode is unknown.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    content: list[Part] = []
    answer: dict[str, Any] = {}
    augmentations = drawn or [None] * len(records)
    for number, (record, augmentation) in enumerate(zip(records, augmentations, strict=True), 1):
        augmented, label = augment_record(record, augmentation), options.label(number)
        for image in record.images:
            dense_image = DenseImage(image, record.size, augmented.drawn, policy or MediaPolicy())
            content += [Text(f"{label}: "), Image(dense_image)]
        if mode == SUMMARY:
            summary = require_summary(record.summary, record.source)
            answer[label] = augmented.summary or summary
        else:
            answer[label] = dense_target(augmented.objects, augmented.size, options)
    prompt = options.prompts[mode]
    messages = (
        Message("system", (Text(prompt.system),)),
        Message("user", (*content, Text(prompt.user))),
        Message("assistant", (Text(json.dumps(answer, ensure_ascii=False)),)),
    )
    unread = tuple(key for record in records for key in record.unread)
    return Conversation(messages, _joined_source([record.source for record in records]), unread=unread)


def dense_target(objects: Sequence[Mapping[str, Any]], size: Size, options: DenseOptions) -> dict[str, Any]:
    """Return the answer about one picture: its objects, each with ``desc``, ``line_points`` (lines only) and geometry.

    Args:
        size: (width, height) in pixels of the picture, to which the coordinates refer.
    """
    if options.reading_order:
        objects = sorted(objects, key=_reading_position)
    target = {}
    for number, entry in enumerate(objects, 1):
        key = geometry_of(entry)
        values = scaled_coordinates(entry[key], size, options.emit_norm)
        points = {"line_points": len(values) // 2} if key == "line" else {}
        target[options.object_key(number)] = {"desc": entry["desc"], **points, key: values}
    return target


def scaled_coordinates(values: Sequence[float], size: Size, emit_norm: str) -> list[int]:
    """Convert pixel coordinates x, y, x, y, ... to the integers of the answer.

    Halves are rounded to even, and values outside the image are clamped to its border.

    Example:
        ``[90, 120, 420, 360]`` of a 1200 x 800 image is ``[75, 150, 350, 450]`` in norm1000.
    """
    scale = SCALES[emit_norm]
    scaled = []
    for place, value in enumerate(values):
        side = size[place % 2]
        number = value if scale is None else value * scale / side  # multiplying first is exact for whole pixels
        scaled.append(min(max(round(number), 0), side if scale is None else scale))
    return scaled


def dense_messages(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as plain dicts for inspection: ``{"system": text, "messages": [user, assistant]}``.

    The system prompt is kept separate, so that ``["messages"][1]["content"][0]["text"]`` is the answer's JSON. Images
    are given as in the record, or as augmented PIL images.
    """
    system = [part for message in conversation.messages if message.role == "system" for part in message.content]
    return {
        "system": "".join(part.text for part in system if isinstance(part, Text)),
        "messages": [
            {"role": message.role, "content": [_plain_part(part) for part in message.content]}
            for message in conversation.messages
            if message.role != "system"
        ],
    }


def _plain_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    kind, value = type(part).__name__.lower(), part.value
    if isinstance(value, DenseImage):
        value = value.value if value.drawn is None else value.open()
    return {"type": kind, kind: value}


def augment_record(record: DenseRecord, drawn: Drawn | None) -> AugmentedRecord:
    """Apply an augmentation to a record, unless that would move all its objects out of the frame."""
    unchanged = AugmentedRecord(record.objects, record.size, None, None)
    if drawn is None:
        return unchanged
    objects, dropped = drawn.objects(record.objects)
    if record.objects and not objects:
        return unchanged
    return AugmentedRecord(objects, drawn.size, build_summary(objects) if dropped else None, drawn)


def _reading_position(entry: Mapping[str, Any]) -> tuple[float, float]:
    """Return the upper and the left edge of an object."""
    values = entry[geometry_of(entry)]
    return min(values[1::2]), min(values[::2])


def _joined_source(sources: Sequence[Source]) -> Source:
    """Join the sources of a group with ``+``; each data set is named once."""
    ids = [source.id for source in sources]
    return Source(
        "+".join(dict.fromkeys(source.dataset for source in sources)),
        " + ".join(source.record for source in sources),
        "+".join(ids) if all(ids) else "",
    )
