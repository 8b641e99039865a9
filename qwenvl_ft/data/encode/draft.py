"""A conversation in tokens, each image or frame still one placeholder: what is known before a pixel is decoded.

Letters: D draft tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Image, Message, Source, Text, Video
from qwenvl_ft.data.media.video import Clip
from qwenvl_ft.errors import DataError

TURN, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
CONTROL = (TURN, TURN_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
"""Only the template writes these. Text that held one would open a turn or a medium of its own."""

Span = tuple[int, int]
"""Characters [begin, end)."""

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
    clips: list[Clip]
    """What of each video is shown."""
    source: Source
    cut_tokens: int = 0
    """Tokens that `cut` took off."""
    cut_media: int = 0
    """Images and videos that went with them."""

    @property
    def length(self) -> int:
        return int(self.counts.sum())

    @property
    def video_grids(self) -> list[tuple[int, int, int]]:
        return [clip.grid for clip in self.clips]

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.image_grids + self.video_grids)


def template_message(message: Message, source: Source) -> dict[str, Any]:
    """A message as chat templates take it; empty texts are left out, as an empty string would be.

    Raises:
        DataError: a text or a tool call holds a control token.
    """
    content: list[dict[str, str]] = []
    for part in message.content:
        if not isinstance(part, Text):
            content.append({"type": "image" if isinstance(part, Image) else "video"})
        elif part.text:
            refuse_control(part.text, f"{source}: the text of a {message.role} message")
            content.append({"type": "text", "text": part.text})
    told: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        refuse_control(message.tool_calls, f"{source}: a tool call")
        told["tool_calls"] = list(message.tool_calls)
    return told


def refuse_control(value: Any, where: str) -> None:
    """Raises DataError if a text, or a string anywhere in a JSON value, holds a control token."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    for token in CONTROL if "<|" in text else ():
        if token in text:
            raise DataError(
                f"{where} holds the control token {token}. Media are written <image> or <video>; other control tokens "
                "are the template's alone."
            )


def shown_turns(text: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], source: Source) -> list[Span]:
    """Characters of each message in the rendered text: its content, and of an assistant the end token and newline.

    A turn begins where the template writes ``<|im_start|>``; no text can hold that token (`template_message`), so
    a user who writes "assistant" is not mistaken for one. Neighbouring tool messages may share a turn.

    Raises:
        DataError: the template leaves out a message, one of its texts or calls, or a tool. Space around a text may
            change, and an answer's ``<think>`` part: thinking models are not shown what they thought in earlier turns.
    """
    spans: list[Span] = []
    place = 0
    for number, message in enumerate(messages):
        where = f"{source}: message {number + 1} of {len(messages)} ({message.role})"
        if message.role != "tool":
            header = f"{TURN}{message.role}\n"
            begin = text.find(header, place)
            end = text.find(TURN_END, begin)
            if begin < 0 or end < 0:
                hint = " Put the system message first." if message.role == "system" and number else ""
                raise DataError(f"{where} is not shown by the chat template as {header!r} ... {TURN_END!r}.{hint}")
            begin += len(header)
        else:
            follows = number > 0 and messages[number - 1].role == "tool"
            begin = place if follows else text.find(TURN, place) + len(TURN)
            end = len(text)
        place = begin
        for wanted in _shown_texts(message):
            found = text.find(wanted, place, end)
            if found < 0:
                raise DataError(f"{where} is not shown whole by the chat template: {wanted!r:.80} is missing.")
            place = found + len(wanted)
        if message.role != "tool":
            place = end + len(TURN_END)
        spans.append((begin, place + text.startswith("\n", place)))
    for name in map(_function_name, tools):
        if name not in text[: text.find(TURN_END)]:
            raise DataError(f"{source}: the chat template does not show the tool {name!r}; this model takes no tools.")
    return spans


def _shown_texts(message: Message) -> list[str]:
    """What of a message must stand in the rendered text, in order."""
    texts = [part.text for part in message.content if isinstance(part, Text)]
    if message.role == "assistant":
        texts = [text.rpartition("</think>")[2] for text in texts]
    return [text.strip() for text in texts if text.strip()] + [_function_name(call) for call in message.tool_calls]


def _function_name(schema: dict[str, Any]) -> str:
    """The name in a function's schema or in a call, with or without the outer ``{"type": "function"}``."""
    inner = schema.get("function")
    return str((inner if isinstance(inner, dict) else schema).get("name", ""))


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
    kept = _slice(draft, keep)
    media = len(draft.images) + len(draft.videos) - len(kept.images) - len(kept.videos)
    return replace(kept, cut_tokens=draft.length - kept.length, cut_media=media)


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
        [draft.clips[k] for k in kept_videos],
        draft.source,
    )
