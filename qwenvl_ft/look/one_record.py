"""Checks one record: finds all of its faults and measures its sample."""

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
from qwenvl_ft.data.media.elsewhere import OutsideRootError
from qwenvl_ft.data.media.frames import frames_text
from qwenvl_ft.data.media.images import medium_name, resolve_path
from qwenvl_ft.data.media.video import clip_pixels
from qwenvl_ft.data.plan.epochs import Epochs, RecordEpochs
from qwenvl_ft.data.readers import RecordWithReader, read_record
from qwenvl_ft.data.readers.media_pool import TagsError
from qwenvl_ft.data.unread import Unread
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.faults import Fault
from qwenvl_ft.look.media_faults import MediaInspector, MediumResult
from qwenvl_ft.look.objects import AnswerObject, named_objects
from qwenvl_ft.look.reference import NO_SUPERVISION, MediaPlan, least_tokens_case, plan_media, text_cases
from qwenvl_ft.look.sample import Case, Measured, SampleInspector

NORM = 1000
"""Largest coordinate in thousandths, the unit of Qwen3-VL's answers."""
GEOMETRY = re.compile(r"\"(bbox_2d|quad|line)\"")


@dataclass(slots=True, kw_only=True)
class Inspected(Measured):
    """Result of checking a record, including its sample if the record is a sample by itself."""

    where: str
    id: str = ""
    dataset: str = ""
    num_images: int = 0
    num_videos: int = 0
    key: bytes = b""
    """Hash of media and text; empty if the record cannot be read."""
    media: tuple[bytes, ...] = ()
    """Content hashes of its media."""
    unread: tuple[Unread, ...] = ()
    """What nothing reads of it."""
    modes: tuple[str, ...] = ()
    """What its image files hold, such as ``RGB`` or ``I;16``."""
    several_frames: tuple[str, ...] = ()
    """Its images of several frames or pages of which none was chosen, each as ``PATH (5 frames)``."""


class Inspector:
    """Checks records one by one.

    Args:
        encoder: of training, or a `reference_encoder`.
        count: count tokens; False checks everything else, and decodes no video.
        encode: indices of the records that are fully encoded, with pixels.
        epochs: the epochs of training over these records; None if training refuses them.
        summaries: every dense caption needs a summary.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        count: bool,
        encode: frozenset[int] = frozenset(),
        epochs: Epochs | None = None,
        summaries: bool = False,
    ) -> None:
        self.encoder = encoder
        self.media = MediaInspector(encoder.policy)
        self.encode = encode
        self.epochs = epochs
        self.summaries = summaries
        self.sample = SampleInspector(encoder) if count else None

    def __call__(self, records: Any, index: int) -> Inspected:
        try:
            record, source, root = records[index]
        except DataError as error:
            where, _, message = str(error).partition(": ")
            return Inspected(where=where, faults=[Fault("json", where, message)])
        seen = Inspected(where=source.record, id=source.id, dataset=source.dataset)
        for reason, text in self._all_cases(record, source, root, seen, index):
            message = text.removeprefix(str(source)).removeprefix(": ")
            seen.faults.append(Fault(reason, source.record, message, source.id))
        return seen

    def _all_cases(self, *arguments: Any) -> Iterator[Case]:
        """Yield `_cases`; an unexpected exception becomes a case, so that one record does not stop the check."""
        try:
            yield from self._cases(*arguments)
        except Exception as error:
            yield "unforeseen", f"{type(error).__name__}: {error}"

    def _cases(self, record: Any, source: Source, root: str | None, seen: Inspected, index: int) -> Iterator[Case]:
        """Yield all faults of a record, and fill in the fields of ``seen``."""
        objects = list(object_cases(record, source))
        yield from objects
        captioned = isinstance(record, Mapping) and dense.matches(record)
        if captioned and self.summaries and (fault := summary_fault(record.get("summary"))):
            yield "structure", f"summary: {fault}, and data.summary_ratio is above 0"
        if objects:  # so that the rest of the record can still be checked
            rest = {**record, "objects": []}
            record = RecordWithReader(rest, record.reader) if isinstance(record, RecordWithReader) else rest
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
        seen.unread = conversation.unread
        images = [self.media.image(stored(image.value)) for image in conversation.media(Image)]
        frames = [frame for video in conversation.media(Video) for frame in self.media.video(video.value)]
        media = images + frames
        seen.num_images, seen.num_videos = len(images), len(conversation.media(Video))
        seen.media = tuple(medium.key for medium in media if medium.key)
        seen.key = content_key(conversation, media)
        seen.modes = tuple(image.mode for image in images if image.mode)
        named = zip(conversation.media(Image), images, strict=True)
        seen.several_frames = tuple(
            frames_text(stored(part.value), image.frames) for part, image in named if image.frames
        )
        broken = list(dict.fromkeys(medium.fault for medium in media if medium.fault))
        broken += size_cases(record, conversation, images)
        plan = MediaPlan() if broken else plan_media(conversation, [image.size for image in images], self.encoder)
        broken += plan.faults
        if self.sample is not None and not broken:
            broken += video_cases(conversation, plan, self.encoder)
        yield from broken
        yield from answer_cases(record, conversation, images)
        if broken:
            if not any(is_supervised(message) for message in conversation.messages):
                yield "unsupervised", NO_SUPERVISION
        elif self.sample is None:
            yield from text_cases(conversation, plan, self.encoder)
            yield from () if captioned else least_tokens_case(plan, self.encoder)
        elif not objects and not isinstance(self.epochs, DenseGroups):
            yield from self._sample_cases(self.sample, conversation, captioned, seen, index)

    def _sample_cases(
        self, inspector: SampleInspector, conversation: Conversation, captioned: bool, seen: Inspected, index: int
    ) -> Iterator[Case]:
        """Check the sample that a single record becomes, with training's prompt and augmentation."""
        if isinstance(self.epochs, RecordEpochs) and (captioned or self.epochs.augmenter is not None):
            try:
                conversation = self.epochs.conversation(0, index)
            except DataError as error:
                yield "structure", str(error)
                return
        elif captioned:
            return  # training refuses its file, so its prompt is unknown
        yield from inspector.cases(conversation, seen, index in self.encode)

    def _absent(self, record: Any, root: str | None) -> Iterator[Case]:
        """Yield the images that an unreadable record names and that cannot be opened."""
        named = [record[key] for key in ("image", "images") if key in record] if isinstance(record, Mapping) else []
        paths = [path for entry in named for path in (entry if isinstance(entry, list) else [entry])]
        for path in paths:
            try:
                result = self.media.image(resolve_path(path, root)) if isinstance(path, str) and path else None
            except OutsideRootError:
                continue  # it is what makes the record unreadable, and is not opened
            if result is not None and result.fault is not None:
                yield result.fault


def stored(value: Any) -> Any:
    """Return the value that the record holds, also for an image that is augmented when opened."""
    return value.value if isinstance(value, DenseImage) else value


def content_key(conversation: Conversation, media: Sequence[MediumResult]) -> bytes:
    """Hash media, text and tools of a conversation."""
    keys = iter(media)
    digest = xxhash.xxh3_128(json.dumps(conversation.tools, sort_keys=True, default=str).encode())
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
    """Yield the faults of each object of a dense-caption record."""
    if not isinstance(record, Mapping) or not dense.matches(record):
        return
    try:
        shell = dense.read_dense_record({**record, "objects": []}, source)
    except DataError:
        return  # the record itself is malformed, which is reported elsewhere
    for place, entry in enumerate(record["objects"]):
        try:
            dense.read_object(entry, f"{source}: objects[{place}]", shell.width, shell.height)
        except DataError as error:
            yield "geometry" if isinstance(error, dense.GeometryError) else "structure", str(error)


def size_cases(record: Any, conversation: Conversation, images: Sequence[MediumResult]) -> Iterator[Case]:
    """Yield the images whose real size differs from the size stated in the record."""
    parts = conversation.media(Image)
    size = (record["width"], record["height"]) if {"width", "height"} <= set(record) else None
    if size is not None and not all(isinstance(side, int) for side in size):
        size = None
    for part, image in zip(parts, images, strict=True):
        stated = part.value.stated if isinstance(part.value, DenseImage) else size
        if stated is not None and not image.fault and image.size != stated:
            found, expected = ("x".join(map(str, sides)) for sides in (image.size, stated))
            yield "size", f"image {medium_name(stored(part.value))} is {found} pixels, the record states {expected}"


def video_cases(conversation: Conversation, plan: MediaPlan, encoder: Encoder) -> Iterator[Case]:
    """Yield the video files in which a frame that training uses cannot be decoded."""
    processor, policy, source = encoder.processor.video_processor, encoder.policy, conversation.source
    for video, clip in zip(conversation.media(Video), plan.clips, strict=True):
        if isinstance(video.value, (list, tuple)):
            continue
        try:
            clip_pixels(video, clip, processor, policy, source)
        except DataError as error:
            yield "corrupt", str(error)


def answer_cases(record: Any, conversation: Conversation, images: Sequence[MediumResult]) -> Iterator[Case]:
    """Yield answers without text, and answers whose coordinates are outside every image in any unit."""
    for number, message in enumerate(conversation.messages):
        if not is_supervised(message):
            continue
        text = "".join(part.text for part in message.content if isinstance(part, Text))
        if not text.strip() and not message.tool_calls:
            yield "empty_answer", f"turn {number} is an answer without text"
        elif GEOMETRY.search(text) and not dense.matches(record):
            side = max((max(image.size) for image in images), default=0)
            faults = (coordinate_fault(named, side) for named in named_objects(text))
            yield from (("geometry", f"an answer's object {fault}") for fault in faults if fault)


def coordinate_fault(named: AnswerObject, side: int) -> str:
    """Return the fault of an object in an answer, whether in pixels or in thousandths; ``""`` if there is none.

    Args:
        side: the longest side of the images, in pixels.
    """
    found, shown = named.found, f"{json.dumps(named.value, ensure_ascii=False):.200}"
    if found is None:
        return f"{shown} does not have exactly one of bbox_2d (4 numbers), quad (8) and line (4, 6, ...)"
    lowest, highest = found.points.min(), found.points.max()
    if lowest < 0 or highest > max(side + dense.TOLERANCE_PIXELS, NORM):
        return f"{shown} is outside the image, both in pixels (at most {side}) and in thousandths"
    if found.kind == "bbox" and not (found.points[0] < found.points[1]).all():
        return f"{shown} is reversed or empty: a box is x1, y1, x2, y2 with x1 < x2 and y1 < y2"
    return ""


def is_supervised(message: Message) -> bool:
    """Return True if a turn is supervised."""
    return message.role == "assistant" and message.loss is not False
