"""Which keys of a record, its turns and their parts does no reader of conversations and messages read?"""

from collections.abc import Collection, Mapping
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Source, Video
from qwenvl_ft.data.readers.media_settings import COUNTS, SECONDS, VIDEO_LIMITS
from qwenvl_ft.data.readers.special_parts import KINDS, VALUES
from qwenvl_ft.data.unread import (
    MEANINGS,
    TEXT_PART_MEANINGS,
    TURN_MEANINGS,
    Meaning,
    Unread,
    once,
    require_media_read,
    unread_keys,
)
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS

SHARED_KEYS = {
    *("id", "fps", "system", "tools", "functions", "image", "images", "video", "videos", *IMAGE_KEYS),
    *("width", "height"),  # `qwenvl-ft check` compares them with the images
}
RECORD_KEYS = {
    "conversations": {"conversations", "data_path", *SHARED_KEYS},
    "messages": {"messages", *SHARED_KEYS},
}
"""Key of the list of turns -> keys of a record that its reader reads, or refuses by an error of its own."""
SHARED_TURN_KEYS = ("loss", "weight", "loss_weight", "tool_calls", "function_call", "reasoning_content")
TURN_KEYS = {
    "conversations": {"from", "value", *SHARED_TURN_KEYS},
    "messages": {"role", "content", *SHARED_TURN_KEYS},
}
"""Key of the list of turns -> keys of a turn that its reader reads or refuses."""
SPECIAL_KEYS = {"type", *VALUES}
"""Keys of a part that is no text and no medium."""
MEDIUM_KEYS = {
    *("type", "value", "image", "image_url", "video", "video_url", "url", "path", "bytes", "frames"),
    *("fps", "sample_fps", *IMAGE_KEYS, *VIDEO_LIMITS, *COUNTS, *SECONDS),
}
"""Keys of a part that is an image or a video."""


def unread_of_record(record: Mapping[str, Any], turns: str, source: Source) -> tuple[Unread, ...]:
    """Return what nothing reads of a record.

    Args:
        turns: key of the list of turns: ``conversations`` or ``messages``.

    Raises:
        DataError: an unread key changes what the record means.
    """
    found = unread_keys(record, RECORD_KEYS[turns], source)
    for number, turn in enumerate(record[turns]):
        if not isinstance(turn, Mapping):
            continue  # the reader refuses it
        where = f"{source}: {turns}[{number}]"
        found += unread_keys(turn, TURN_KEYS[turns], where, f"{turns}[].", (*TURN_MEANINGS, *MEANINGS))
        content = turn.get("content")
        for place, part in enumerate(content if isinstance(content, (list, tuple)) else [content]):
            if isinstance(part, Mapping):
                known, meanings = _part_keys(part)
                found += unread_keys(part, known, f"{where}.content[{place}]", f"{turns}[].content[].", meanings)
    return once(found)


def _part_keys(part: Mapping[str, Any]) -> tuple[Collection[str], tuple[Meaning, ...]]:
    """Return the keys of a part that its reader reads, and the meanings of the others."""
    if str(part.get("type")) in KINDS:  # a type that is not a text is refused by the reader
        return SPECIAL_KEYS, MEANINGS
    text = next((key for key in ("text", "value") if isinstance(part.get(key), str)), None)
    if text is not None and (part.get("type") or "text") == "text":
        return ("type", text), (*TEXT_PART_MEANINGS, *MEANINGS)
    return MEDIUM_KEYS, MEANINGS


def require_media_shown(conversation: Conversation, record: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise DataError if a conversation shows no medium, but its record names one under a key that nothing reads."""
    if not conversation.media(Image) and not conversation.media(Video):
        require_media_read(record, known, conversation.source)
