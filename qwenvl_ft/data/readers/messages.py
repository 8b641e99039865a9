"""``{"messages": [{"role": "user", "content": ...}, ...]}``: OpenAI style, with content lists, tools and tool calls.

Text stays as it is written. Content is a string or a list of parts: ``{"type": "text", "text": ...}``,
``{"type": "image", "image": ...}``, ``{"type": "video", "video": ...}``. ``url``, ``path`` and ``image_url`` are
understood too. A string may hold ``<image>`` tags for the record's own ``images`` list.
"""

from typing import Any

from qwenvl_ft.data.conversation import ROLES, Conversation, Image, Message, Part, Source, Text, Video
from qwenvl_ft.data.readers.conversations import TAGS, MediaPool, _checked, split_tags
from qwenvl_ft.errors import DataError, hint

KEYS = {
    "image": ("image", "url", "path", "image_url", "bytes"),
    "image_url": ("image_url", "url"),
    "video": ("video", "url", "path", "video_url", "frames"),
    "video_url": ("video_url", "url"),
}
"""Type of a medium's part -> the keys its value may stand under, the proper one first."""


def matches(record: dict[str, Any]) -> bool:
    return "messages" in record


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Raises DataError: a message is malformed, or tags and media do not match."""
    told = record["messages"]
    if not isinstance(told, list) or not told:
        raise DataError(f"{source}: 'messages' must be a list with at least one message.")
    pool = MediaPool(record, source, media_root)
    messages = tuple(_message(message, number, pool, media_root) for number, message in enumerate(told))
    pool.finish()
    tools = record.get("tools") or ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{source}: 'tools' must be a list of function schemas.")
    return Conversation(messages, source, tuple(_plain(tool) for tool in tools))


def _message(message: Any, number: int, pool: MediaPool, media_root: str | None) -> Message:
    source, where = pool.source, f"{pool.source}: messages[{number}]"
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where} must be {{'role': ..., 'content': ...}}, it is {message!r:.80}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where} has role={role!r}.{hint(str(role), ROLES)}")
    calls = message.get("tool_calls") or ()
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, str):
        parts = _text(content, role, pool, where)
    elif isinstance(content, (list, tuple)):
        parts = tuple(_part(part, f"{where}.content[{k}]", source, media_root) for k, part in enumerate(content))
    else:
        raise DataError(f"{where} has no content: a text or a list of parts is needed, it is {content!r:.80}.")
    if role in ("assistant", "system") and any(not isinstance(part, Text) for part in parts):
        raise DataError(f"{where} is one of role {role} with a medium. Media belong to user and tool messages.")
    loss = message.get("loss")
    return Message(role, parts, tuple(_plain(call) for call in calls), None if loss is None else bool(loss))


def _text(content: str, role: str, pool: MediaPool, where: str) -> tuple[Part, ...]:
    if not TAGS.search(content):
        return (Text(content),)
    if role in ("assistant", "system"):
        raise DataError(f"{where} is one of role {role} with a media tag. Media belong to user and tool messages.")
    return split_tags(content, pool)


def _part(part: Any, where: str, source: Source, media_root: str | None) -> Part:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise DataError(f"{where} must be an object with a 'type', it is {part!r:.80}.")
    kind = part.get("type") or next((key for key in ("text", *KEYS) if part.get(key) is not None), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where} has type 'text' and no text.")
        return Text(part["text"])
    if kind not in KEYS:
        raise DataError(f"{where} has type={kind!r}.{hint(str(kind), ('text', *KEYS))}")
    value = next((part[key] for key in KEYS[kind] if part.get(key) is not None), None)
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    if value is None:
        proper = KEYS[kind][0]
        raise DataError(f"{where} has type {kind!r} and no {proper!r}. Write {{'type': '{kind}', '{proper}': path}}.")
    if kind.startswith("image"):
        return Image(_checked(value, "image", source, media_root))
    if isinstance(value, (list, tuple)):
        return Video(tuple(_checked(frame, "frame", source, media_root) for frame in value), part.get("fps"))
    return Video(_checked(value, "video", source, media_root), part.get("fps"))


def _plain(value: Any) -> Any:
    """Without the None fields that Arrow adds where records differ."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
