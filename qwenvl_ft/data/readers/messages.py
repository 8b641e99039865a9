"""``{"messages": [{"role": "user", "content": ...}, ...]}``: OpenAI style, with content lists, tools and tool calls.

Texts are kept verbatim. Content is a string or a list of parts: ``{"type": "text", "text": ...}``,
``{"type": "image", "image": ...}``, ``{"type": "video", "video": ...}``; ``url``, ``path`` and ``image_url`` are
accepted too, and ``value`` for any of them. Parts of other types are read by special_parts.py. The record's ``images``
and ``videos`` go where a text has ``<image>`` or ``<video>`` tags, or where a part is just ``{"type": "image"}``; one
message cannot use both. A part may set its own size limits and frame sampling (readers/media_settings.py).
"""

from typing import Any

from qwenvl_ft.data.conversation import ROLES, Conversation, Image, Message, Part, Source, Text, Video
from qwenvl_ft.data.media.reading import read_as
from qwenvl_ft.data.readers.media_pool import TAGS, MediaPool, TagsError, medium_value, split_tags, unescaped
from qwenvl_ft.data.readers.media_settings import checked_fps, limits_of, part_reading, sampling_of
from qwenvl_ft.data.readers.record_keys import checked_loss, checked_objects, checked_turns, with_record_keys
from qwenvl_ft.data.readers.special_parts import KINDS, expanded
from qwenvl_ft.data.readers.unread_turns import RECORD_KEYS, require_media_shown, unread_of_record
from qwenvl_ft.errors import DataError, hint

KEYS = {
    "image": ("image", "url", "path", "image_url", "bytes", "value"),
    "image_url": ("image_url", "url", "value"),
    "video": ("video", "url", "path", "video_url", "frames", "value"),
    "video_url": ("video_url", "url", "value"),
}
"""Type of a media part -> keys that may hold its value, the canonical one first."""


def matches(record: dict[str, Any]) -> bool:
    return record.get("messages") is not None


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Convert a record.

    Raises:
        DataError: a message is malformed, or tags and media do not match.
    """
    checked_turns(record, "messages", source, singular="message")
    unread = unread_of_record(record, "messages", source)
    pool = MediaPool(record, source, media_root)
    plain, entries = expanded(record, source)
    messages = tuple(_message(entry, number, pool, media_root) for number, entry in entries)
    pool.finish()
    conversation = Conversation(messages, source, unread=unread)
    require_media_shown(conversation, record, RECORD_KEYS["messages"])
    return with_record_keys(conversation, plain)


def _message(message: Any, number: int, pool: MediaPool, media_root: str | None) -> Message:
    where = f"{pool.source}: messages[{number}]"
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where} must be {{'role': ..., 'content': ...}}, not {message!r:.80}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where} has role={role!r}.{hint(str(role), ROLES)}")
    calls = _tool_calls(message, where)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls and role {role!r}. Only an assistant calls tools.")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, str):
        parts = _text_parts(content, role, pool, where)
    elif isinstance(content, (list, tuple)):
        parts = _parts(content, role, pool, where, media_root)
    else:
        raise DataError(f"{where}: content must be a text or a list of parts, not {content!r:.80}.")
    if role in ("assistant", "system") and any(not isinstance(part, Text) for part in parts):
        raise TagsError(f"{where} has role {role!r} and a medium. Media belong to user and tool messages.")
    return Message(role, parts, calls, *checked_loss(message, role, where))


def _tool_calls(message: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """Return a message's tool calls; the older ``function_call`` is a single call."""
    calls = checked_objects(message.get("tool_calls"), f"{where}: 'tool_calls'", "calls")
    older = message.get("function_call")
    if older and calls:
        raise DataError(f"{where} has both 'tool_calls' and 'function_call'. Keep the first.")
    if older:
        calls = ({"type": "function", "function": older},)
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where} calls a tool without a 'name': {call!r:.80}.")
        if not isinstance(function.get("arguments"), (dict, str)):
            raise DataError(f"{where} calls {function['name']!r} without 'arguments'. Give an object or its JSON text.")
    return calls


def _text_parts(content: str, role: str, pool: MediaPool, where: str) -> tuple[Part, ...]:
    if not TAGS.search(content):
        return (Text(unescaped(content)),)
    if role in ("assistant", "system"):
        raise TagsError(
            f"{where} has role {role!r} and a media tag. Media belong to user and tool messages; if it is meant as "
            "text, write a backslash before the tag."
        )
    return split_tags(content, pool)


def _parts(content: Any, role: str, pool: MediaPool, where: str, media_root: str | None) -> tuple[Part, ...]:
    texts = [_text_of(part) for part in content]
    if None in texts and any(TAGS.search(text) for text in texts if text):
        raise DataError(
            f"{where} has media both as parts and as tags in a text. Drop the tags, or the parts; "
            "a backslash before a tag makes it text."
        )
    parts: list[Part] = []
    for k, (part, text) in enumerate(zip(content, texts, strict=True)):
        place = f"{where}.content[{k}]"
        parts += _text_parts(text, role, pool, place) if text is not None else [_medium(part, place, pool, media_root)]
    return tuple(parts)


def _text_of(part: Any) -> str | None:
    """Return the text of a text part; None for any other part."""
    if isinstance(part, dict) and (part.get("type") or "text") == "text":
        part = part.get("text") if part.get("text") is not None else part.get("value")
    return part if isinstance(part, str) else None


def kind_of(part: dict[str, Any]) -> Any:
    """Return the type of a part, which the key of its value stands for if it has none."""
    return part.get("type") or next((key for key in ("text", *KEYS) if part.get(key) is not None), None)


def value_of(part: dict[str, Any], kind: str) -> Any:
    """Return the value of a media part; None if it has none."""
    value = next((part[key] for key in KEYS[kind] if part.get(key) is not None), None)
    return value["url"] if isinstance(value, dict) and "url" in value else value


def _medium(part: Any, where: str, pool: MediaPool, media_root: str | None) -> Part:
    if not isinstance(part, dict):
        raise DataError(f"{where} must be an object with a 'type', not {part!r:.80}.")
    kind = kind_of(part)
    if kind == "text":
        raise DataError(f"{where} has type 'text' and no text.")
    if isinstance(kind, str) and "audio" in kind:
        raise DataError(f"{where} has type={kind!r}, a medium that the model has no input for. Drop the record.")
    if not isinstance(kind, str) or kind not in KEYS:
        raise DataError(f"{where} has type={kind!r}.{hint(str(kind), ('text', *KEYS, *KINDS))}")
    keys = {key for key, entry in part.items() if entry is not None}
    tag = f"<{kind.removesuffix('_url')}>"
    if keys == {"type"} and pool.has(tag):
        return pool.take(tag)
    value = value_of(part, kind)
    if value is None:
        canonical = KEYS[kind][0]
        raise DataError(
            f"{where} has type {kind!r} and no {canonical!r}. Write {{'type': '{kind}', '{canonical}': path}}."
        )
    if kind.startswith("image"):
        image = read_as(medium_value(value, "image", pool.source, media_root), part_reading(part, where))
        return Image(image, limits_of(part, "image", where))
    fps = checked_fps(part.get("fps"), where) or checked_fps(part.get("sample_fps"), where) or pool.fps
    settings = (fps, limits_of(part, "video", where), sampling_of(part, where))
    if isinstance(value, (list, tuple)):
        if not value:
            raise DataError(f"{where} is a video with an empty list of frames.")
        reading = part_reading(part, where)
        frames = (medium_value(frame, "frame", pool.source, media_root) for frame in value)
        return Video(tuple(read_as(frame, reading) for frame in frames), *settings)
    part_reading(part, where, frames=False)
    return Video(medium_value(value, "video", pool.source, media_root), *settings)
