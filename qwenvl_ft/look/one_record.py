"""One record, looked at from every side: all that is wrong with it, and what the planner needs to know of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from qwenvl_ft.data.conversation import Conversation, Image, Message, Source, Text, Video
from qwenvl_ft.data.dense import dense_record as dense
from qwenvl_ft.data.dense.compose import DenseImage
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.summary import summary_fault
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy, resolve_path
from qwenvl_ft.data.media.video import clip_pixels, plan_clip
from qwenvl_ft.data.plan.epochs import Epochs, RecordEpochs
from qwenvl_ft.data.readers import Told, read_record
from qwenvl_ft.data.readers.conversations import TagsError
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.faults import Fault
from qwenvl_ft.look.media_faults import Looked, MediaLooker
from qwenvl_ft.look.objects import Named, named_objects
from qwenvl_ft.look.sample import Case, Measured, SampleLook

NORM = 1000
"""Largest coordinate in thousandths, the unit that Qwen3-VL answers in."""
GEOMETRY = re.compile(r"\"(bbox_2d|quad|line)\"")


@dataclass(slots=True, kw_only=True)
class Inspected(Measured):
    """What is known of a record, and of its sample where it becomes one by itself."""

    where: str
    id: str = ""
    dataset: str = ""
    num_images: int = 0
    key: bytes = b""
    """The same for the same media and text; empty if it cannot be read."""
    media: tuple[bytes, ...] = ()
    """Keys of its media's content."""


class Inspector:
    """Looks at records one by one.

    Args:
        encoder: None looks at everything but tokens.
        encode: indices of the records that are made samples, pixels and all.
        epochs: what training makes of the records; None if it refuses them.
        summaries: every dense caption needs a summary.
    """

    def __init__(
        self,
        policy: MediaPolicy,
        encoder: Encoder | None = None,
        encode: frozenset[int] = frozenset(),
        epochs: Epochs | None = None,
        summaries: bool = False,
    ) -> None:
        self.media = MediaLooker(policy)
        self.encode = encode
        self.epochs = epochs
        self.summaries = summaries
        self.sample = None if encoder is None else SampleLook(encoder)

    def __call__(self, records: Any, index: int) -> Inspected:
        try:
            record, source, root = records[index]
        except DataError as error:
            where, _, told = str(error).partition(": ")
            return Inspected(where=where, faults=[Fault("json", where, told)])
        seen = Inspected(where=source.record, id=source.id, dataset=source.dataset)
        for reason, told in self._all_cases(record, source, root, seen, index):
            message = told.removeprefix(str(source)).removeprefix(": ")
            seen.faults.append(Fault(reason, source.record, message, source.id))
        return seen

    def _all_cases(self, *arguments: Any) -> Iterator[Case]:
        """`_cases`, and what none of them foresaw: one record must not hide the others."""
        try:
            yield from self._cases(*arguments)
        except Exception as error:
            yield "unforeseen", f"{type(error).__name__}: {error}"

    def _cases(self, record: Any, source: Source, root: str | None, seen: Inspected, index: int) -> Iterator[Case]:
        """Everything that is wrong; fills in what is right."""
        objects = list(object_cases(record, source))
        yield from objects
        captioned = isinstance(record, Mapping) and dense.matches(record)
        if captioned and self.summaries and (fault := summary_fault(record.get("summary"))):
            yield "structure", f"summary: {fault}, and data.summary_ratio is above 0"
        if objects:  # without them the rest can be looked at too
            rest = {**record, "objects": []}
            record = Told(rest, record.reader) if isinstance(record, Told) else rest
        try:
            conversation = read_record(record, source, root)
        except TagsError as error:
            yield "tags", str(error)
            return
        except DataError as error:
            reason = "geometry" if isinstance(error, dense.GeometryError) else "structure"
            absent = list(self._absent(record, root))  # some formats need an image's size to be read
            yield from absent or [(reason, str(error))]
            return
        images = [self.media.image(stored(image.value)) for image in conversation.media(Image)]
        frames = [frame for video in conversation.media(Video) for frame in self.media.video(video.value)]
        media = images + frames
        seen.num_images = len(images)
        seen.media = tuple(medium.key for medium in media if medium.key)
        seen.key = content_key(conversation, media)
        broken = list(dict.fromkeys(medium.fault for medium in media if medium.fault))
        broken += size_cases(record, conversation, images)
        if self.sample is not None and not broken:
            broken += film_cases(conversation, self.sample.encoder)
        yield from broken
        yield from answer_cases(record, conversation, images)
        if self.sample is None or broken:
            if not any(is_learned(message) for message in conversation.messages):
                yield "unsupervised", "no assistant turn is learned from"
        elif not objects and not isinstance(self.epochs, DenseGroups):
            yield from self._sample_cases(self.sample, conversation, captioned, seen, index)

    def _sample_cases(
        self, look: SampleLook, conversation: Conversation, captioned: bool, seen: Inspected, index: int
    ) -> Iterator[Case]:
        """What the sample of a record by itself will be, asked and coloured as training has it."""
        if isinstance(self.epochs, RecordEpochs) and (captioned or self.epochs.augmenter is not None):
            try:
                conversation = self.epochs.conversation(0, index)
            except DataError as error:
                yield "structure", str(error)
                return
        elif captioned:
            return  # training refuses its file, so nobody knows how it would be asked about
        yield from look.cases(conversation, seen, index in self.encode)

    def _absent(self, record: Any, root: str | None) -> Iterator[Case]:
        """Images that a record which cannot be read names, and that cannot be opened."""
        told = [record[key] for key in ("image", "images") if key in record] if isinstance(record, Mapping) else []
        paths = [path for entry in told for path in (entry if isinstance(entry, list) else [entry])]
        for path in paths:
            looked = self.media.image(resolve_path(path, root)) if isinstance(path, str) and path else None
            if looked is not None and looked.fault is not None:
                yield looked.fault


def stored(value: Any) -> Any:
    """What the record has, of an image that is augmented when it is opened."""
    return value.value if isinstance(value, DenseImage) else value


def content_key(conversation: Conversation, media: Sequence[Looked]) -> bytes:
    """The same for records that show the same media and say the same."""
    keys = iter(media)
    digest = xxhash.xxh3_128()
    for message in conversation.messages:
        calls = json.dumps(message.tool_calls, sort_keys=True, default=str)
        digest.update(f"\0{message.role}\0{calls}".encode(errors="surrogatepass"))
        for part in message.content:
            if isinstance(part, Text):
                digest.update(f"\1{part.text}".encode(errors="surrogatepass"))
                continue
            count = len(part.value) if isinstance(part, Video) and isinstance(part.value, (list, tuple)) else 1
            for _ in range(count):
                digest.update(b"\2" + (next(keys).key or repr(stored(part.value)).encode()))
    return digest.digest()


def object_cases(record: Any, source: Source) -> Iterator[Case]:
    """Faults of a dense-caption record's objects, each by itself."""
    if not isinstance(record, Mapping) or not dense.matches(record):
        return
    try:
        shell = dense.read_dense_record({**record, "objects": []}, source)
    except DataError:
        return  # the whole record is malformed, and is told to be
    for place, entry in enumerate(record["objects"]):
        try:
            dense.read_object(entry, f"{source}: objects[{place}]", shell.width, shell.height)
        except DataError as error:
            yield "geometry" if isinstance(error, dense.GeometryError) else "structure", str(error)


def size_cases(record: Any, conversation: Conversation, images: Sequence[Looked]) -> Iterator[Case]:
    """Images whose true size is not the one that the record states."""
    parts = conversation.media(Image)
    told = (record["width"], record["height"]) if {"width", "height"} <= set(record) else None
    if told is not None and not all(isinstance(side, int) for side in told):
        told = None
    for part, image in zip(parts, images, strict=True):
        stated = part.value.stated if isinstance(part.value, DenseImage) else told
        if stated is not None and not image.fault and image.size != stated:
            found, expected = ("x".join(map(str, size)) for size in (image.size, stated))
            yield "size", f"image {stored(part.value)!s:.200} is {found} pixels, the record states {expected}"


def film_cases(conversation: Conversation, encoder: Encoder) -> Iterator[Case]:
    """Video files of which a frame that training shows cannot be decoded."""
    processor, policy, source = encoder.processor.video_processor, encoder.policy, conversation.source
    for video in conversation.media(Video):
        if isinstance(video.value, (list, tuple)):
            continue
        try:
            clip_pixels(video, plan_clip(video, processor, policy, source), processor, policy, source)
        except DataError as error:
            yield "corrupt", str(error)


def answer_cases(record: Any, conversation: Conversation, images: Sequence[Looked]) -> Iterator[Case]:
    """Answers without text, and answers whose coordinates lie outside every image in any unit."""
    for number, message in enumerate(conversation.messages):
        if not is_learned(message):
            continue
        text = "".join(part.text for part in message.content if isinstance(part, Text))
        if not text.strip() and not message.tool_calls:
            yield "empty_answer", f"turn {number} is an answer without text"
        elif GEOMETRY.search(text) and not dense.matches(record):
            side = max((max(image.size) for image in images), default=0)
            faults = (coordinate_fault(named, side) for named in named_objects(text))
            yield from (("geometry", f"an answer's object {told}") for told in faults if told)


def coordinate_fault(named: Named, side: int) -> str:
    """What is wrong with an object of an answer, whether it is in pixels or in thousandths; ``""`` if nothing.

    Args:
        side: the longest side of the images, in pixels.
    """
    found, shown = named.found, f"{json.dumps(named.value, ensure_ascii=False):.200}"
    if found is None:
        return f"{shown} has not exactly one of bbox_2d (4 numbers), quad (8) and line (4, 6, ...)"
    lowest, highest = found.points.min(), found.points.max()
    if lowest < 0 or highest > max(side + dense.TOLERANCE_PIXELS, NORM):
        return f"{shown} is outside the image, be it in pixels (of {side} at most) or in thousandths"
    if found.kind == "bbox" and not (found.points[0] < found.points[1]).all():
        return f"{shown} is reversed or empty: a box is x1, y1, x2, y2 with x1 < x2 and y1 < y2"
    return ""


def is_learned(message: Message) -> bool:
    """Whether a turn is supervised."""
    return message.role == "assistant" and message.loss is not False
