"""What flows through the data path: the types of a conversation and of a sample.

A record (a dict, as its file holds it) becomes a `Conversation` in a reader; the encoder makes a `Sample` of it.

Letters in shapes: L tokens of one sample, T tokens of a row, P vision patches, N images or videos.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

IGNORE = -100
"""Label of a token that is not supervised: the value that torch's cross entropy leaves out."""

ROLES = ("system", "user", "assistant", "tool")
"""The roles a message may have, in every format."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record came from. It travels into the batch, so that a bad loss can be traced."""

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
    """How large one medium is shown, instead of the recipe's rule; None where the rule holds."""

    min_pixels: int | None = None
    """Smallest area of an image, or of one frame, after resizing."""
    max_pixels: int | None = None
    """Largest area, likewise."""
    total_pixels: int | None = None
    """Largest area of all frames together."""
    resized_height: int | None = None
    """Height to resize to, rounded to whole merged patches; goes with ``resized_width``."""
    resized_width: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video file are shown, instead of the recipe's rule; None where the rule holds."""

    num_frames: int | None = None
    """Exactly so many, spread evenly."""
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    """Seconds into the video."""
    end: float | None = None
    """Seconds into the video."""


@dataclass(frozen=True, slots=True)
class Image:
    value: Any
    """Absolute path, allowed URL, ``data:`` URI, bytes or PIL image."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Video:
    value: Any
    """Absolute path or bytes of a video file, or a list of frames, each as an image's value."""
    fps: float | None = None
    """Frames shown a second: those of a list as they are; of a file so many are taken."""
    limits: Limits = Limits()
    sampling: Sampling = Sampling()


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: tuple[Part, ...]
    tool_calls: tuple[dict[str, Any], ...] = ()
    """OpenAI style calls of an assistant; the chat template writes them behind the content."""
    loss: bool | None = None
    """Whether an assistant turn is supervised; None is the rule (assistant turns are)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    source: Source
    tools: tuple[dict[str, Any], ...] = ()

    def media(self, kind: type) -> list[Any]:
        """All `Image` or all `Video` parts, in the order in which the template shows them."""
        return [part for message in self.messages for part in message.content if isinstance(part, kind)]


class Sample(TypedDict, total=False):
    """The tensors of one conversation. The media keys are absent where there are none."""

    input_ids: Tensor
    """int64[L]"""
    labels: Tensor
    """int64[L]: the token itself where supervised, else -100; always -100 at 0."""
    position_ids: Tensor
    """int64[3, L]: time, height, width."""
    pixel_values: Tensor
    """float32[P, 1536] (channels * temporal patch * patch * patch)"""
    image_grid_thw: Tensor
    """int64[N, 3]: patches along time, height, width."""
    pixel_values_videos: Tensor
    video_grid_thw: Tensor
    source: Source
    fault: str
    """Why the record's own sample could not be made; this one stands in for it, without labels."""
