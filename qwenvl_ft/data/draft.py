"""A conversation in tokens, each image or frame still one placeholder: what is known before a pixel is decoded.

Letters: D draft tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Image, Message, Source, Text, Video
from qwenvl_ft.errors import DataError

IGNORE = -100
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
CONTROL = (TURN, TURN_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
"""Only the template writes these. Text that held one would open a turn or a medium of its own."""

STRATEGIES = ("raise", "delete", "left", "right")


class TooLong(DataError):
    """A sample does not fit ``max_length`` and the strategy forbids to cut it."""


class Unsupervised(DataError):
    """No token of the sample is supervised, so nothing can be learned from it."""


@dataclass(frozen=True)
class Draft:
    """A conversation in tokens, each image or frame still one placeholder."""

    ids: NDArray[np.int64]
    """[D]"""
    supervised: NDArray[np.bool_]
    """[D]"""
    counts: NDArray[np.int64]
    """[D] tokens that each becomes; 1 for text."""
    widths: NDArray[np.int64]
    """[D] tokens in a line of the grid; 0 for text."""
    group: NDArray[np.int64]
    """[D] number of the medium that the token belongs to, borders and times included; -1 for text."""
    images: list[Image]
    image_grids: list[tuple[int, int, int]]
    """Patches along time, height, width."""
    videos: list[Video]
    video_grids: list[tuple[int, int, int]]
    source: Source

    @property
    def length(self) -> int:
        return int(self.counts.sum())

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.image_grids + self.video_grids)


def template_message(message: Message, source: Source) -> dict[str, Any]:
    """A message as chat templates take it; text with a control token is refused."""
    content: list[dict[str, str]] = []
    for part in message.content:
        if isinstance(part, Text):
            for token in CONTROL:
                if token in part.text:
                    raise DataError(
                        f"{source}: the text of a {message.role} message holds the control token {token}. "
                        "Media are written <image> or <video>; other control tokens are the template's alone."
                    )
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image" if isinstance(part, Image) else "video"})
    told: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        told["tool_calls"] = list(message.tool_calls)
    return told


def answers(text: str, messages: tuple[Message, ...], source: Source) -> list[tuple[int, int]]:
    """Characters of each supervised turn: its content, the end token and the newline.

    A turn begins where the template writes ``<|im_start|>``; no text can hold that token (`template_message`), so
    a user who writes "assistant" is not mistaken for one.
    """
    header = f"{TURN}assistant\n"
    wanted = [message for message in messages if message.role == "assistant"]
    spans: list[tuple[int, int]] = []
    begin = text.find(header)
    while begin >= 0 and len(spans) < len(wanted):
        begin += len(header)
        end = text.find(TURN_END, begin)
        if end < 0:
            break
        end += len(TURN_END)
        spans.append((begin, end + text.startswith("\n", end)))
        begin = text.find(header, end)
    if len(spans) != len(wanted):
        raise DataError(
            f"{source}: {len(wanted)} assistant turns, but the chat template shows {len(spans)} as "
            f"{header!r} ... {TURN_END!r}. This processor's template is not supported."
        )
    return [span for span, message in zip(spans, wanted, strict=True) if message.loss is not False]


def token_span(encoding: Any, begin: int, end: int) -> tuple[int, int]:
    """Tokens that lie wholly in the characters [begin, end).

    An answer that begins with a newline shares its first token with the header's newline; that token stays outside, as
    in the official preprocessing.
    """
    token = encoding.char_to_token(begin)
    while token is None:  # a character that normalisation folded into another
        begin += 1
        token = encoding.char_to_token(begin)
    first = token if encoding.token_to_chars(token)[0] >= begin else token + 1
    return first, encoding.char_to_token(end - 1) + 1


def cut(draft: Draft, max_length: int | None, strategy: str) -> Draft:
    """At most ``max_length`` tokens of a draft; a medium stays whole or goes.

    Raises:
        TooLong: the strategy is neither ``left`` nor ``right``.
    """
    if max_length is None or draft.length <= max_length:
        return draft
    if strategy not in ("left", "right"):
        raise too_long(draft, max_length)
    ends = np.cumsum(draft.counts)
    if strategy == "right":
        stop = int(np.searchsorted(ends, max_length, side="right"))
        while stop > 0 and _inside(draft.group, stop):
            stop -= 1
        keep = slice(0, stop)
    else:
        start = int(np.searchsorted(ends, draft.length - max_length, side="left")) + 1
        while start < draft.ids.size and _inside(draft.group, start):
            start += 1
        keep = slice(start, draft.ids.size)
    return _slice(draft, keep)


def too_long(draft: Draft, max_length: int) -> TooLong:
    """The error for a sample that does not fit, with what can be done."""
    media = f", {draft.patches} patches of media" if draft.patches else ""
    return TooLong(
        f"{draft.source}: {draft.length} tokens{media}, but template.max_length is {max_length}. Raise it, "
        "lower template.max_pixels, or set template.truncation_strategy to delete, left or right."
    )


def _inside(group: NDArray[np.int64], place: int) -> bool:
    """Whether a cut before ``place`` goes through a medium."""
    return bool(group[place] >= 0 and group[place - 1] == group[place])


def _slice(draft: Draft, keep: slice) -> Draft:
    """The draft of some of its tokens, with the media that they still show."""
    group = draft.group[keep]
    images, videos = range(len(draft.images)), range(len(draft.videos))
    kept = set(group[group >= 0].tolist())
    kept_images = [k for k in images if k in kept]
    kept_videos = [k for k in videos if k + len(draft.images) in kept]
    return Draft(
        draft.ids[keep],
        draft.supervised[keep],
        draft.counts[keep],
        draft.widths[keep],
        group,
        [draft.images[k] for k in kept_images],
        [draft.image_grids[k] for k in kept_images],
        [draft.videos[k] for k in kept_videos],
        [draft.video_grids[k] for k in kept_videos],
        draft.source,
    )
