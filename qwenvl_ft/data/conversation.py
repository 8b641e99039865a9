"""Defines the types of the data path: a conversation with its messages and media, and a sample.

A reader turns a record (a dict, as stored in its file) into a `Conversation`; the encoder turns that into a `Sample`.

Letters in shapes: L tokens of one sample, P vision patches, N images or videos.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor

from qwenvl_ft.data.unread import Unread

IGNORE = -100
"""Label of an unsupervised token: the ``ignore_index`` of torch's cross entropy."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles of messages, in every format."""


@dataclass(frozen=True, slots=True)
class Source:
    """Origin of a record. It travels into the batch, so that a bad loss can be traced to its records."""

    dataset: str
    """Name or file of the data set."""
    record: str
    """``file.jsonl:12`` (line, from 1), ``file.json[3]`` or ``file.parquet[3]`` (index, from 0)."""
    id: str = ""
    """The record's own ``id``, if it has one."""

    def __str__(self) -> str:
        return f"{self.record} (id {self.id!r})" if self.id else self.record


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Limits:
    """Size limits of one medium, which override the recipe's; None keeps the recipe's."""

    min_pixels: int | None = None
    """Smallest area of an image, or of one video frame, after resizing."""
    max_pixels: int | None = None
    """Largest area of an image, or of one video frame, after resizing."""
    total_pixels: int | None = None
    """Largest total area of all frames of a video."""
    resized_height: int | None = None
    """Height to resize to, in pixels, rounded to whole merged patches; needs ``resized_width``."""
    resized_width: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Frame selection of one video file, which overrides the recipe's; None keeps the recipe's."""

    num_frames: int | None = None
    """Exact number of frames, evenly spaced."""
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    """Start of the clip, in seconds into the video."""
    end: float | None = None
    """End of the shown part, in seconds into the video."""


@dataclass(frozen=True, slots=True)
class Image:
    value: Any
    """Absolute path, allowed URL, ``data:`` URI, bytes or PIL image."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Video:
    value: Any
    """Absolute path or bytes of a video file, or a list of frames, each with a value as in `Image`."""
    fps: float | None = None
    """Frames per second: the rate of a list of frames, or the rate at which a file is sampled."""
    limits: Limits = Limits()
    sampling: Sampling = Sampling()


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: tuple[Part, ...]
    tool_calls: tuple[dict[str, Any], ...] = ()
    """OpenAI-style calls of an assistant; the chat template writes them after the content."""
    loss: bool | None = None
    """False leaves an assistant turn unsupervised; None and True supervise it."""
    weight: float = 1.0
    """Weight of the turn's supervised tokens in the training loss."""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    source: Source
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[Unread, ...] = field(default=(), compare=False)
    """What the record holds and nothing reads."""

    def media(self, kind: type) -> list[Any]:
        """Return all `Image` or all `Video` parts, in the order in which the template shows them."""
        return [part for message in self.messages for part in message.content if isinstance(part, kind)]


class Sample(TypedDict, total=False):
    """The tensors of one conversation. The keys of a medium are absent if there is none."""

    input_ids: Tensor
    """int64[L]"""
    labels: Tensor
    """int64[L]: the token itself where supervised, else `IGNORE`; always `IGNORE` at position 0."""
    label_weights: Tensor
    """float64[L]: weight of each label in the training loss; absent if all are 1."""
    position_ids: Tensor
    """int64[3, L]: time, height, width."""
    pixel_values: Tensor
    """float32[P, 1536] (channels * temporal patch * patch * patch)"""
    image_grid_thw: Tensor
    """int64[N, 3]: patches along time, height, width."""
    pixel_values_videos: Tensor
    """float32[P, 1536], as ``pixel_values``."""
    video_grid_thw: Tensor
    """int64[N, 3], as ``image_grid_thw``."""
    source: Source
    fault: str
    """Why the record could not be encoded. The sample is then an unsupervised placeholder."""
    image_owners: Tensor
    """int64[frames]: in a row that several ranks train, the place of the rank that has each image's pixels."""
    video_owners: Tensor
    """int64[frames]: the same for each pair of a video's frames."""
    ticket: Any
    """What the sample was made from, in a row that several ranks train."""
    digest: int
    """Hash of all that those ranks must have in common."""
