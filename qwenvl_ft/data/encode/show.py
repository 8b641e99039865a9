"""Renders a conversation as text with the processor's chat template: the first step of encoding.

The text holds one placeholder for each image and for each video frame pair. Media are expanded later, as tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import Qwen3VLProcessor

from qwenvl_ft.data.conversation import Image, Message, Source, Text
from qwenvl_ft.data.encode.draft import CONTROL, ENCLOSED_VIDEO, TURN, TURN_END, VIDEO_PAD
from qwenvl_ft.data.media.refused import no_videos
from qwenvl_ft.data.media.video import Clip
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.upstream.templates import TemplateRenderer, render_with_tools

HEADER = f"{TURN}assistant\n"


class ChatTemplate:
    """Renders messages with a chat template.

    Args:
        tokenizer: of transformers; its special tokens are the template's variables.
        text: the template in Jinja.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._render = TemplateRenderer(tokenizer, text)
        self.openings = tuple(sorted({self._opening(thinking) for thinking in (False, True)}, key=len, reverse=True))
        """What the template may write after the header of an answer in a prompt, the longest first: ``<think>`` and a
        newline, or an empty think block; an empty text for templates that write nothing."""

    def _opening(self, thinking: bool) -> str:
        question: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        options = {"add_vision_id": False, "enable_thinking": thinking}
        try:
            prompt = self._render(question, add_generation_prompt=True, **options)
            return prompt.removeprefix(self._render(question, add_generation_prompt=False, **options)).removeprefix(
                HEADER
            )
        except (TemplateError, TypeError, ValueError):
            return ""  # each record names the template's error

    @property
    def special_tokens(self) -> dict[str, Any]:
        return self._render.special_tokens

    def render(
        self, messages: Sequence[Message], tools: list[Any], source: Source, *, invite: bool, **variables: bool
    ) -> str:
        """Return the text of all messages, with one placeholder for each image or video.

        Args:
            invite: append the header of an assistant turn, for generation.
            variables: of the template: ``add_vision_id`` and ``enable_thinking``.

        Raises:
            DataError: a text, tool call or tool holds a control token, or the template rejects the messages.
        """
        chat = [template_message(message, source) for message in messages]
        refuse_control(tools, f"{source}: a tool")
        options = {"add_generation_prompt": invite} | variables
        try:
            if tools or any("tool_calls" in message for message in chat):
                return render_with_tools(self._tokenizer, self.text, chat, tools or None, **options)
            return self._render(chat, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{source}: the chat template cannot render it: {one_line(error)}.") from None


def template_message(message: Message, source: Source) -> dict[str, Any]:
    """Convert a message to the dict that chat templates take. Empty texts are omitted; they would render as nothing.

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
    converted: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        refuse_control(message.tool_calls, f"{source}: a tool call")
        converted["tool_calls"] = list(message.tool_calls)
    return converted


def refuse_control(value: Any, where: str) -> None:
    """Raise DataError if a text, or any string in a JSON value, holds a control token."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    for token in CONTROL if "<|" in text else ():
        if token in text:
            raise DataError(
                f"{where} holds the control token {token}. Write media as <image> or <video>; only the chat template "
                "may write control tokens."
            )


def write_times(text: str, clips: list[Clip], processor: Any, source: Source) -> str:
    """Replace each video's one placeholder, with or without vision tokens, by a time and a placeholder per frame pair.

    The released models were trained on ``<0.3 seconds><|vision_start|>...<|vision_end|>`` with nothing around it, as
    the processors of transformers 4.57 to 5.9 write it. Later processors keep an outer pair of vision tokens, unless
    the template has none, as that of an export.

    Raises:
        DataError: the processor is not Qwen3-VL's, or the template left out or added a video.
    """
    if not clips:
        return text
    if not isinstance(processor, Qwen3VLProcessor):
        raise no_videos(source, processor)
    pieces = text.replace(ENCLOSED_VIDEO, VIDEO_PAD).split(VIDEO_PAD)
    if len(pieces) != len(clips) + 1:
        raise DataError(f"{source}: {len(clips)} videos, but the chat template renders {len(pieces) - 1}.")
    written, step = [pieces[0]], processor.video_processor.temporal_patch_size
    for clip, piece in zip(clips, pieces[1:], strict=True):
        written += [f"<{seconds:.1f} seconds>{ENCLOSED_VIDEO}" for seconds in clip.times(step)]
        written.append(piece)
    return "".join(written)


def require_tools_shown(text: str, tools: Sequence[dict[str, Any]], source: Source) -> None:
    """Raise DataError if the template left out a tool; its name must be in the first turn."""
    for name in map(function_name, tools):
        if name not in text[: text.find(TURN_END)]:
            raise DataError(
                f"{source}: the chat template does not render the tool {name!r}; it does not support tools."
            )


def function_name(schema: dict[str, Any]) -> str:
    """Return the name in a function schema or a tool call, with or without the outer ``{"type": "function"}``."""
    inner = schema.get("function")
    return str((inner if isinstance(inner, dict) else schema).get("name", ""))
