"""``{"messages": [{"role": "user", "content": ...}, ...]}``: OpenAI style, with content lists, tools and tool calls.

Text stays as it is written. Content is a string or a list of parts: ``{"type": "text", "text": ...}``,
``{"type": "image", "image": ...}``, ``{"type": "video", "video": ...}``. ``url``, ``path`` and ``image_url`` are
understood too. The record's own ``images`` and ``videos`` are shown where a string has ``<image>`` or ``<video>`` tags,
or where a part is nothing but ``{"type": "image"}``.
"""

from typing import Any

from qwenvl_ft.data.conversation import ROLES, Conversation, Image, Message, Part, Source, Text, Video
from qwenvl_ft.data.readers.conversations import TAGS, MediaPool, _checked, checked_fps, checked_loss, split_tags
from qwenvl_ft.errors import DataError, hint

KEYS = {
    "image": ("image", "url", "path", "image_url", "bytes"),
    "image_url": ("image_url", "url"),
    "video": ("video", "url", "path", "video_url", "frames"),
    "video_url": ("video_url", "url"),
}
"""Type of a medium's part -> the keys its value may stand under, the proper one first."""

PER_MEDIUM = (
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("nframes", "min_frames", "max_frames", "video_start", "video_end"),
)
"""Keys of qwen-vl-utils that change how one medium is shown. Passed over, they would be lost without a word."""


def matches(record: dict[str, Any]) -> bool:
    return record.get("messages") is not None


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Raises DataError: a message is malformed, or tags and media do not match."""
    told = record.get("messages")
    if not isinstance(told, list) or not told:
        raise DataError(f"{source}: 'messages' must be a list with at least one message, it is {told!r:.80}.")
    pool = MediaPool(record, source, media_root)
    messages = tuple(_message(message, number, pool, media_root) for number, message in enumerate(told))
    pool.finish()
    return Conversation(messages, source, _objects(record.get("tools"), f"{source}: 'tools'", "function schemas"))


def _message(message: Any, number: int, pool: MediaPool, media_root: str | None) -> Message:
    where = f"{pool.source}: messages[{number}]"
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where} must be {{'role': ..., 'content': ...}}, it is {message!r:.80}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where} has role={role!r}.{hint(str(role), ROLES)}")
    calls = _objects(message.get("tool_calls"), f"{where}: 'tool_calls'", "calls")
    if calls and role != "assistant":
        raise DataError(f"{where} is one of role {role} with tool_calls. Only an assistant calls tools.")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, str):
        parts = _text(content, role, pool, where)
    elif isinstance(content, (list, tuple)):
        parts = tuple(_part(part, f"{where}.content[{k}]", pool, media_root) for k, part in enumerate(content))
    else:
        raise DataError(f"{where} has no content: a text or a list of parts is needed, it is {content!r:.80}.")
    if role in ("assistant", "system") and any(not isinstance(part, Text) for part in parts):
        raise DataError(f"{where} is one of role {role} with a medium. Media belong to user and tool messages.")
    return Message(role, parts, calls, checked_loss(message.get("loss"), where))


def _text(content: str, role: str, pool: MediaPool, where: str) -> tuple[Part, ...]:
    if not TAGS.search(content):
        return (Text(content),)
    if role in ("assistant", "system"):
        raise DataError(f"{where} is one of role {role} with a media tag. Media belong to user and tool messages.")
    return split_tags(content, pool)


def _part(part: Any, where: str, pool: MediaPool, media_root: str | None) -> Part:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise DataError(f"{where} must be an object with a 'type', it is {part!r:.80}.")
    kind = part.get("type") or next((key for key in ("text", *KEYS) if part.get(key) is not None), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where} has type 'text' and no text.")
        return Text(part["text"])
    if not isinstance(kind, str) or kind not in KEYS:
        raise DataError(f"{where} has type={kind!r}.{hint(str(kind), ('text', *KEYS))}")
    told = {key for key, entry in part.items() if entry is not None}
    for key in sorted(told.intersection(PER_MEDIUM)):
        raise DataError(
            f"{where} sets {key} of one {kind}, which is not supported. Set template.min_pixels and max_pixels for all "
            "images; give a video as the list of its frames."
        )
    tag = f"<{kind.removesuffix('_url')}>"
    if told == {"type"} and pool.has(tag):
        return pool.take(tag)
    value = next((part[key] for key in KEYS[kind] if part.get(key) is not None), None)
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    if value is None:
        proper = KEYS[kind][0]
        raise DataError(f"{where} has type {kind!r} and no {proper!r}. Write {{'type': '{kind}', '{proper}': path}}.")
    if kind.startswith("image"):
        return Image(_checked(value, "image", pool.source, media_root))
    fps = checked_fps(part.get("fps"), where) or pool.fps
    if isinstance(value, (list, tuple)):
        if not value:
            raise DataError(f"{where} is a video with an empty list of frames.")
        return Video(tuple(_checked(frame, "frame", pool.source, media_root) for frame in value), fps)
    return Video(_checked(value, "video", pool.source, media_root), fps)


def _objects(value: Any, where: str, what: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{where} must be a list of {what}, it is {value!r:.80}.")
    return tuple(value)
