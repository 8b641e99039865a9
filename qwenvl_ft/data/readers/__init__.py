"""The record formats, and `read_record`, which turns a record of any of them into a `Conversation`.

A reader is a pair of functions: ``matches`` recognises its records, ``read`` converts one. The first reader in
`READERS` that matches a record converts it, either to a conversation or to a record of another format, which is then
read in turn.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Source, Video
from qwenvl_ft.data.media.elsewhere import OutsideRootError, require_inside
from qwenvl_ft.data.media.opening import file_of
from qwenvl_ft.data.readers import coco, conversations, dense, grounding, llava, messages, pairs, sharegpt
from qwenvl_ft.data.readers.record_keys import with_image_keys
from qwenvl_ft.data.unread import unread_keys
from qwenvl_ft.errors import DataError, hint, one_line

Record = dict[str, Any]
Read = Callable[[Record, Source, str | None], Conversation | Record | None]


@dataclass(frozen=True)
class Reader:
    """One record format."""

    matches: Callable[[Record], bool]
    """Returns True if a record has this format, judging by its keys and the types of their values."""
    read: Read
    """(record, its source, folder of relative media paths) -> conversation, or a record of another format; None
    leaves the record to the remaining readers."""
    needs: tuple[tuple[str, ...], ...] = ()
    """Keys that every record of this format has, one tuple per variant; listed in the error for an unknown record."""


READERS: dict[str, Reader] = {
    "sharegpt": Reader(sharegpt.matches, sharegpt.rewrite),
    "grounding": Reader(grounding.matches, grounding.rewrite),
    "llava": Reader(llava.matches, llava.rewrite),
    "conversations": Reader(conversations.matches, conversations.read, (("conversations",),)),
    "messages": Reader(messages.matches, messages.read, (("messages",),)),
    "pairs": Reader(
        pairs.matches,
        pairs.rewrite,
        (*((question, answer) for question, _, answer in pairs.FORMS), *((key,) for key in pairs.LISTS)),
    ),
    "coco": Reader(coco.matches, coco.read, (("images", "objects", "categories"),)),
    "dense": Reader(dense.matches, dense.read, (("images", "objects", "width", "height"),)),
}
"""Name -> reader, in the order in which they are tried."""
BUILT_IN = frozenset(READERS)


class RecordWithReader(Record):
    """A record whose data set names its reader, so that the format is not guessed from its keys."""

    def __init__(self, record: Record, reader: str) -> None:
        super().__init__(record)
        self.reader = reader

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordWithReader, (dict(self), self.reader)


def register_reader(name: str, matches: Callable[[Record], bool] | None, read: Read) -> None:
    """Add a custom format. It is tried before the built-in ones.

    Args:
        matches: None calls ``read`` on every record; ``read`` then returns None for records that are not its own.
        read: (record, its source, folder of relative media paths) -> a `Conversation`, or, which is shorter, a record
            in a known format: ``{"messages": [...], "images": [...]}``. Define it in a module, so that dataloader
            workers can import it under every start method.
    """
    known = dict(READERS)
    READERS.clear()
    READERS.update(
        {name: Reader(matches or _match_all, read)} | {key: reader for key, reader in known.items() if key != name}
    )


def own_readers(import_paths: Iterable[str | None] = ()) -> dict[str, Reader]:
    """Return the registered readers that are not built in, and those that data sets name by import path."""
    registered = {name: reader for name, reader in READERS.items() if name not in BUILT_IN}
    return registered | {path: import_reader(path) for path in import_paths if path and ":" in path}


def code_state(reader: Reader) -> str:
    """Return size and modification time of the file that defines a reader's function; a cache key for its code."""
    try:
        stat = Path(inspect.getsourcefile(inspect.unwrap(reader.read)) or "").stat()
    except (OSError, TypeError):
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}"


@cache
def import_reader(path: str) -> Reader:
    """Import the reader at ``module:name``: a `Reader`, or a function as `register_reader` takes it.

    Modules in the working directory are found too.

    Raises:
        DataError: it cannot be imported, or is neither.
    """
    module, _, name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # of any type: the module's own code runs
        raise DataError(
            f"reader {path!r} cannot be imported: {one_line(error)}. Write module:function, and put the "
            "module's folder on PYTHONPATH."
        ) from None
    if isinstance(found, Reader):
        return found
    if not callable(found):
        raise DataError(f"reader {path!r} is a {type(found).__name__}. It must be a function of a record, or a Reader.")
    return Reader(_match_all, found)


def read_record(
    record: Any, source: Source, media_root: str | None = None, *, reader: str | None = None
) -> Conversation:
    """Read a record of any known format.

    Args:
        media_root: folder that relative media paths start at.
        reader: name of the format, or the import path of a custom reader. None takes the reader that the record's
            data set names (`RecordWithReader`), and otherwise recognises the format.

    Raises:
        DataError: no reader matches the record, or its content is malformed.
    """
    conversation = _convert(record, source, media_root, reader, until=None)
    assert isinstance(conversation, Conversation)
    return conversation


def read_to_dense(record: Any, source: Source, media_root: str | None = None) -> Conversation | Record:
    """Read a record as `read_record` does, but return dense-caption records as records, converted ones included.

    Dense captions are read in groups (data/dense), not one by one.
    """
    return _convert(record, source, media_root, None, until="dense")


def _convert(
    record: Any, source: Source, media_root: str | None, reader: str | None, until: str | None
) -> Conversation | Record:
    """Apply one reader after the other until the result is a conversation or has the format ``until``."""
    if not isinstance(record, dict):
        raise DataError(f"{source}: a record must be a JSON object, not a {type(record).__name__}.")
    name = reader or (record.reader if isinstance(record, RecordWithReader) else None)
    current: Conversation | Record = record
    tried: list[str] = []
    while isinstance(current, dict):
        if name is None:
            name = next((key for key, known in READERS.items() if key not in tried and known.matches(current)), None)
        if name is None:
            unread_keys(current, (), source)
            raise DataError(f"{source}: {_describe_unknown(current)}")
        if name == until:
            return current
        chosen = READERS[name] if name in READERS else _reader_by_path(name, source)
        try:
            current = _checked(chosen.read(current, source, media_root), current, name, source)
            if isinstance(current, Conversation) and name not in BUILT_IN:
                _require_inside(current, media_root)
        except OutsideRootError as error:
            raise DataError(f"{source}: {error}") from None
        tried.append(name)
        name = None
    return with_image_keys(current, record)


def _require_inside(conversation: Conversation, media_root: str | None) -> None:
    """Check the media of a custom reader, which may have resolved their paths by itself."""
    for medium in [*conversation.media(Image), *conversation.media(Video)]:
        for value in medium.value if isinstance(medium.value, (list, tuple)) else [medium.value]:
            if (path := file_of(value)) is not None:
                require_inside(path, path, media_root)


def _reader_by_path(name: str, source: Source) -> Reader:
    if ":" in name:
        return import_reader(name)
    raise DataError(f"{source}: unknown format {name!r}.{hint(name, READERS)}")


def _checked(result: Any, record: Record, name: str, source: Source) -> Conversation | Record:
    """Return a reader's result, or the record itself if the reader declined it with None."""
    if result is None:
        return record
    if not isinstance(result, (Conversation, dict)):
        raise DataError(
            f"{source}: the reader {name!r} returned a {type(result).__name__}, not a Conversation or a record."
        )
    return result


def _match_all(record: Record) -> bool:
    return True


def _describe_unknown(record: Record) -> str:
    """Return the error text for a record of no known format: its keys, and the formats that it nearly matches."""
    present = [str(key) for key, value in record.items() if value is not None]
    needs = [keys for reader in READERS.values() for keys in reader.needs]
    near = [text for keys in needs if (text := _near_miss(keys, present))]
    nearly = f"Nearly: {'; '.join(dict.fromkeys(near))}. " if near else ""
    known = ", ".join(" + ".join(keys) for keys in dict.fromkeys(needs))
    return f"no format has the keys {', '.join(sorted(present)) or '(none)'}. {nearly}Known: {known}."


def _near_miss(keys: tuple[str, ...], present: list[str]) -> str:
    """Return ``'query' without 'response'``, or ``'mesages' instead of 'messages'``; empty if nothing is close."""
    have = [key for key in keys if key in present]
    close = {key: get_close_matches(key, present, n=1, cutoff=0.8) for key in keys if key not in have}
    if not have and not any(close.values()):
        return ""
    if missing := [key for key, matches in close.items() if not matches]:
        return f"{_quoted(have)} without {_quoted(missing)}" if have else ""
    return ", ".join(f"{matches[0]!r} instead of {key!r}" for key, matches in close.items())


def _quoted(keys: list[str]) -> str:
    return " and ".join(map(repr, keys))
