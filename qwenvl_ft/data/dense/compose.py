"""Records -> one conversation: their images, one question, one JSON object as the answer.

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
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.errors import DataError, unknown_name

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class DenseImage:
    """An image of a record, augmented when it is opened; its final size is known from its header.

    Both refuse an image whose real size is not the record's: every coordinate of the answer would be wrong.
    """

    value: Any
    """Path, URL, bytes or PIL image."""
    stated: Size
    """Width and height that the record states."""
    drawn: Drawn | None = None
    policy: MediaPolicy = field(default_factory=MediaPolicy)

    def size(self) -> tuple[int, int]:
        """(height, width) of what `open` returns; decodes no pixel."""
        height, width = image_size(self.value, self.policy)
        self._check((width, height))
        width, height = self.stated if self.drawn is None else self.drawn.size
        return height, width

    def open(self) -> PILImage.Image:
        image = open_image(self.value, self.policy)
        self._check(image.size)
        return image if self.drawn is None else self.drawn.image(image)

    def _check(self, found: Size) -> None:
        if found != self.stated:
            name = self.value if isinstance(self.value, str) else f"of type {type(self.value).__name__}"
            raise DataError(
                f"image {name} is {found[0]} x {found[1]} pixels, but its record states width={self.stated[0]}, "
                f"height={self.stated[1]}. Correct the record; images that share objects must have one size."
            )


@dataclass(frozen=True, slots=True)
class Seen:
    """A record as the model gets it."""

    objects: Sequence[Mapping[str, Any]]
    size: Size
    summary: str | None
    """Made anew because objects left the frame; None if the record's own still holds."""
    drawn: Drawn | None


def dense_conversation(
    records: Sequence[DenseRecord],
    options: DenseOptions,
    mode: str = "dense",
    *,
    drawn: Sequence[Drawn | None] | None = None,
    policy: MediaPolicy | None = None,
) -> Conversation:
    """Join the records of a group.

    Every image stands behind the label of its record, so that the labels shown are the keys of the answer, whatever
    number of images a record has.

    Args:
        mode: ``dense`` asks for objects, ``summary`` for a line about each picture.
        drawn: the augmentation of each record; None leaves all as they are. One that leaves no object of a record in
            the frame is not applied to it; where some leave it, the summary is made anew from those that stay.

    Raises:
        DataError: a summary is asked for and missing or malformed.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    content: list[Part] = []
    answer: dict[str, Any] = {}
    for number, (record, change) in enumerate(zip(records, drawn or [None] * len(records), strict=True), 1):
        told, label = seen(record, change), options.label(number)
        for image in record.images:
            content += [Text(f"{label}: "), Image(DenseImage(image, record.size, told.drawn, policy or MediaPolicy()))]
        if mode == SUMMARY:
            own = require_summary(record.summary, record.source)
            answer[label] = told.summary or own
        else:
            answer[label] = dense_target(told.objects, told.size, options)
    prompt = options.prompts[mode]
    messages = (
        Message("system", (Text(prompt.system),)),
        Message("user", (*content, Text(prompt.user))),
        Message("assistant", (Text(json.dumps(answer, ensure_ascii=False)),)),
    )
    return Conversation(messages, _joined([record.source for record in records]))


def dense_target(objects: Sequence[Mapping[str, Any]], size: Size, options: DenseOptions) -> dict[str, Any]:
    """The answer about one picture: its objects, each ``desc``, ``line_points`` (of a line), geometry.

    Args:
        size: (width, height) of the picture that the geometry lies in.
    """
    if options.reading_order:
        objects = sorted(objects, key=_reading_place)
    target = {}
    for number, entry in enumerate(objects, 1):
        key = geometry_of(entry)
        values = emitted(entry[key], size, options.emit_norm)
        points = {"line_points": len(values) // 2} if key == "line" else {}
        target[options.object_key(number)] = {"desc": entry["desc"], **points, key: values}
    return target


def emitted(values: Sequence[float], size: Size, emit_norm: str) -> list[int]:
    """Pixel coordinates x, y, x, y, ... as the answer writes them: integers, halves to even, never outside.

    Example:
        ``[90, 120, 420, 360]`` of a 1200 x 800 image is ``[75, 150, 350, 450]`` in norm1000.
    """
    scale = SCALES[emit_norm]
    written = []
    for place, value in enumerate(values):
        side = size[place % 2]
        number = value if scale is None else value * scale / side  # multiplied first: exact for whole pixels
        written.append(min(max(round(number), 0), side if scale is None else scale))
    return written


def dense_messages(conversation: Conversation) -> dict[str, Any]:
    """A conversation to look at: ``{"system": text, "messages": [user, assistant]}``.

    ``["messages"][1]["content"][0]["text"]`` is the answer's JSON: the system prompt stands apart. An image is what its
    record has, or the augmented picture.
    """
    system = [part for message in conversation.messages if message.role == "system" for part in message.content]
    return {
        "system": "".join(part.text for part in system if isinstance(part, Text)),
        "messages": [
            {"role": message.role, "content": [_shown(part) for part in message.content]}
            for message in conversation.messages
            if message.role != "system"
        ],
    }


def _shown(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    kind, value = type(part).__name__.lower(), part.value
    if isinstance(value, DenseImage):
        value = value.value if value.drawn is None else value.open()
    return {"type": kind, kind: value}


def seen(record: DenseRecord, drawn: Drawn | None) -> Seen:
    """A record after its augmentation, unless that leaves none of its objects in the frame."""
    plain = Seen(record.objects, record.size, None, None)
    if drawn is None:
        return plain
    objects, dropped = drawn.objects(record.objects)
    if record.objects and not objects:
        return plain
    return Seen(objects, drawn.size, build_summary(objects) if dropped else None, drawn)


def _reading_place(entry: Mapping[str, Any]) -> tuple[float, float]:
    """Upper, then left edge of an object."""
    values = entry[geometry_of(entry)]
    return min(values[1::2]), min(values[::2])


def _joined(sources: Sequence[Source]) -> Source:
    """Where the records of a group came from; ``+`` between them, equal data sets once."""
    ids = [source.id for source in sources]
    return Source(
        "+".join(dict.fromkeys(source.dataset for source in sources)),
        " + ".join(source.record for source in sources),
        "+".join(ids) if all(ids) else "",
    )
