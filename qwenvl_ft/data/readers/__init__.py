"""Which format a record has, and the one door through which it becomes a conversation.

A reader is a pair of functions: does it know this record, and what conversation is it. The first in `READERS` that
knows a record reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Source
from qwenvl_ft.data.dense import reader as dense
from qwenvl_ft.data.readers import coco, conversations, messages
from qwenvl_ft.errors import DataError, hint

Record = dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """One format."""

    matches: Callable[[Record], bool]
    """Whether a record has this format, from its keys and the shape of their values."""
    read: Callable[[Record, Source, str | None], Conversation]
    """(record, where it came from, folder of relative media) -> conversation."""


READERS: dict[str, Reader] = {
    "conversations": Reader(conversations.matches, conversations.read),
    "messages": Reader(messages.matches, messages.read),
    "coco": Reader(coco.matches, coco.read),
    "dense": Reader(dense.matches, dense.read),
}
"""Name -> reader, in the order in which they are asked."""


class Told(Record):
    """A record whose data set names its format, so that it is not recognised by its keys."""

    def __init__(self, record: Record, reader: str) -> None:
        super().__init__(record)
        self.reader = reader

    def __reduce__(self) -> tuple[Any, ...]:
        return Told, (dict(self), self.reader)


def register_reader(
    name: str, matches: Callable[[Record], bool], read: Callable[[Record, Source, str | None], Conversation]
) -> None:
    """Add a format of one's own. It is asked before the built-in ones."""
    known = dict(READERS)
    READERS.clear()
    READERS.update({name: Reader(matches, read)} | {key: value for key, value in known.items() if key != name})


def read_record(
    record: Any, source: Source, media_root: str | None = None, *, reader: str | None = None
) -> Conversation:
    """Read a record in whatever format it has.

    Args:
        media_root: folder that relative media paths start at.
        reader: name of the format; None is the one that the record was told (`Told`), else recognises it.

    Raises:
        DataError: no reader knows the record, or its content is malformed.
    """
    if not isinstance(record, dict):
        raise DataError(f"{source}: a record is a JSON object, this is a {type(record).__name__}.")
    if isinstance(record, Told):
        reader = reader or record.reader
    if reader is not None:
        if reader not in READERS:
            raise DataError(f"{source}: unknown format {reader!r}.{hint(reader, READERS)}")
        return READERS[reader].read(record, source, media_root)
    for known in READERS.values():
        if known.matches(record):
            return known.read(record, source, media_root)
    raise DataError(
        f"{source}: no format has the keys {', '.join(sorted(map(str, record))) or '(none)'}. A record needs "
        f"'conversations' or 'messages'; formats: {', '.join(READERS)}."
    )
