"""What a server is asked about a record: the messages before its last answer, in the form of the OpenAI API.

Images are sent as PNG. Videos are sent as the frames that training shows, because a server that gets a file samples it
by rules of its own. Only vLLM takes such frames: a ``video_url`` of the type ``video/jpeg`` joins images by commas, in
any format that PIL opens (PNG keeps every pixel), and ``media_io_kwargs`` of the request has their numbers in the video
and its frame rate. All media have their full size; the server resizes them by its own limits, as for any client.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image as PILImage

from qwenvl_ft.data.conversation import Conversation, Image, Limits, Message, Part, Text, Video
from qwenvl_ft.data.encode.encoder import Encoder, without_answer
from qwenvl_ft.data.media.images import open_image
from qwenvl_ft.data.media.video import Clip, clip_frames, plan_clip
from qwenvl_ft.errors import DataError


class NotAsked(DataError):
    """A server cannot be asked about a record; the message is the reason, without the record."""


@dataclass(frozen=True)
class Asked:
    """A question to a server."""

    messages: list[dict[str, Any]]
    """Without the system prompt of training: the server has it in its chat template, or lacks it."""
    media_io_kwargs: dict[str, Any] | None = None
    """Which frames of which videos the messages hold; None if they hold no video."""
    tools: list[dict[str, Any]] | None = None
    """Function schemas of the record, or else of the encoder."""


def asked_of(conversation: Conversation, encoder: Encoder) -> Asked:
    """Return the question of a record; it holds the frames of the videos, so its size is that of their PNG files.

    Raises:
        NotAsked: a medium has limits of its own, or its videos show different frames.
        DataError: a medium cannot be read, or nothing precedes the answer.
    """
    shown = without_answer(conversation)
    videos, processor = shown.media(Video), encoder.processor.video_processor
    if any(medium.limits != Limits() for medium in shown.media(Image) + videos):
        raise NotAsked("the record has pixel limits of its own, which a request cannot carry")
    clips = [plan_clip(video, processor, encoder.policy, shown.source) for video in videos]
    chosen = _media_io_kwargs(clips)  # before any frame is decoded
    parts = (_video(video, clip, encoder, conversation) for video, clip in zip(videos, clips, strict=True))
    messages = [
        _message(turn, [_part(part, parts, encoder) for part in turn.content if part != Text("")])
        for turn in shown.messages
    ]
    return Asked(messages, chosen, list(shown.tools or encoder.tools or ()) or None)


def _message(turn: Message, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a message of the API; without empty texts, before whose tool calls templates write a line break."""
    calls = [call.get("function") or call for call in turn.tool_calls]
    written = [
        {"id": f"call_{number}", "type": "function", "function": {"name": call["name"], "arguments": _json(call)}}
        for number, call in enumerate(calls)
    ]
    return {"role": turn.role, "content": content} | ({"tool_calls": written} if written else {})


def _json(call: dict[str, Any]) -> str:
    """Return the arguments of a call as JSON text, as the API has them."""
    arguments = call["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _media_io_kwargs(clips: list[Clip]) -> dict[str, Any] | None:
    if not clips:
        return None
    if len({(clip.indices, clip.rate) for clip in clips}) > 1:
        raise NotAsked(
            "its videos show different frames, and a request to vLLM has one choice of frames for all videos"
        )
    first = clips[0]
    return {
        "video": {
            "num_frames": -1,  # all that are sent
            "fps": first.rate,
            "frames_indices": list(first.indices),
            "total_num_frames": first.indices[-1] + 1,
            "do_sample_frames": False,
        }
    }


def _part(part: Part, videos: Iterator[dict[str, Any]], encoder: Encoder) -> dict[str, Any]:
    """Return a part of a message; that of a video is the next of ``videos``."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Video):
        return next(videos)
    data = _png(open_image(part.value, encoder.policy))
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _video(video: Video, clip: Clip, encoder: Encoder, conversation: Conversation) -> dict[str, Any]:
    frames = list(clip_frames(video, clip, encoder.policy, conversation.source))  # encoding is not in its time limit
    data = ",".join(_png(PILImage.fromarray(frame)) for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{data}"}}


def _png(image: PILImage.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()
