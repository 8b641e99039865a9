"""``{"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, ...]}``: the official format.

Human turns are split at their media tags; the pieces are stripped and blank ones dropped, as the official
preprocessing does (qwen-vl-finetune, data_processor.py). Answers are kept verbatim. ``system`` and ``tools`` of the
record, and ``loss`` or ``weight`` of a turn are supported too.
"""

from typing import Any

from qwenvl_ft.data.conversation import Conversation, Message, Source, Text
from qwenvl_ft.data.media.elsewhere import MediaRoot
from qwenvl_ft.data.media.images import resolve_path
from qwenvl_ft.data.readers.media_pool import TAGS, MediaPool, TagsError, split_tags, unescaped
from qwenvl_ft.data.readers.record_keys import checked_loss, checked_turns, with_record_keys
from qwenvl_ft.data.readers.unread_turns import RECORD_KEYS, require_media_shown, unread_of_record
from qwenvl_ft.errors import DataError, hint

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def matches(record: dict[str, Any]) -> bool:
    return record.get("conversations") is not None


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Convert a record.

    Raises:
        DataError: a turn is malformed, or tags and media do not match.
    """
    turns = checked_turns(record, "conversations", source, singular="turn")
    unread = unread_of_record(record, "conversations", source)
    root = _media_root(record, source, media_root)
    pool = MediaPool(record, source, root)
    messages = tuple(_message(turn, number, pool) for number, turn in enumerate(turns))
    pool.finish()
    conversation = Conversation(messages, source, unread=unread)
    require_media_shown(conversation, record, RECORD_KEYS["conversations"])
    return with_record_keys(conversation, record)


def _message(turn: Any, number: int, pool: MediaPool) -> Message:
    source = pool.source
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise DataError(f"{source}: conversations[{number}] must be {{'from': ..., 'value': text}}, not {turn!r:.80}.")
    for key in ("reasoning_content", "tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(f"{source}: conversations[{number}] has {key!r}. Write the record as 'messages'.")
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"{source}: conversations[{number}] has from={turn['from']!r}.{hint(str(turn['from']), ROLES)}")
    loss, weight = checked_loss(turn, role, f"{source}: conversations[{number}]")
    text = turn["value"]
    if role == "user":
        return Message(role, split_tags(text, pool))
    if TAGS.search(text):
        raise TagsError(
            f"{source}: conversations[{number}] is a {turn['from']} turn with a media tag. Media belong to human "
            "turns; if it is meant as text, write a backslash before the tag."
        )
    return Message(role, (Text(unescaped(text)),), loss=loss, weight=weight)


def _media_root(record: dict[str, Any], source: Source, media_root: str | None) -> str | None:
    """Return the record's ``data_path`` below the media root, or the media root if the record has none."""
    folder = record.get("data_path")
    if not folder:
        return media_root
    if not isinstance(folder, str):
        raise DataError(f"{source}: data_path={folder!r:.80} must be the path of a folder.")
    path = resolve_path(folder, media_root)
    if not isinstance(media_root, MediaRoot):
        return MediaRoot(path, key="data_path of the record")
    return MediaRoot(path, media_root.beside, "data_path of the record", media_root.within, media_root.strict)
