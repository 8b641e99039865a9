"""Which format a record has, and the one door through which it becomes a conversation.

A reader is a pair of functions: does it know this record, and what is it. The first in `READERS` that knows a record
reads it, either to a conversation or to a record of another format, which is then read in turn.
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

from qwenvl_ft.data.conversation import Conversation, Source
from qwenvl_ft.data.dense import reader as dense
from qwenvl_ft.data.readers import coco, conversations, grounding, llava, messages, pairs, sharegpt
from qwenvl_ft.errors import DataError, hint, one_line

Record = dict[str, Any]
Read = Callable[[Record, Source, str | None], Conversation | Record | None]


@dataclass(frozen=True)
class Reader:
    """One format."""

    matches: Callable[[Record], bool]
    """Whether a record has this format, from its keys and the shape of their values."""
    read: Read
    """(record, where it came from, folder of relative media) -> conversation, or a record of another format; None
    passes the record on."""
    needs: tuple[tuple[str, ...], ...] = ()
    """Keys that a record of it has, in one or several forms; said of a record that no format knows."""


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
"""Name -> reader, in the order in which they are asked."""
BUILT_IN = frozenset(READERS)


class Told(Record):
    """A record whose data set names its format, so that it is not recognised by its keys."""

    def __init__(self, record: Record, reader: str) -> None:
        super().__init__(record)
        self.reader = reader

    def __reduce__(self) -> tuple[Any, ...]:
        return Told, (dict(self), self.reader)


def register_reader(name: str, matches: Callable[[Record], bool] | None, read: Read) -> None:
    """Add a format of one's own. It is asked before the built-in ones.

    Args:
        matches: None asks ``read`` for every record; it returns None for those that are not its own.
        read: (record, where it came from, folder of relative media) -> a `Conversation`, or a record in a format that
            is known, which is the short way: ``{"messages": [...], "images": [...]}``. Define it in a module, so that
            the workers of a loader find it however they are started.
    """
    known = dict(READERS)
    READERS.clear()
    READERS.update({name: Reader(matches or _always, read)} | {k: value for k, value in known.items() if k != name})


def own_readers(named: Iterable[str | None] = ()) -> dict[str, Reader]:
    """Registered readers that are not built in, and those that data sets name by import path."""
    registered = {name: reader for name, reader in READERS.items() if name not in BUILT_IN}
    return registered | {name: import_reader(name) for name in named if name and ":" in name}


def code_state(reader: Reader) -> str:
    """Changes when the file of a reader's function does: its size and time of change."""
    try:
        stat = Path(inspect.getsourcefile(inspect.unwrap(reader.read)) or "").stat()
    except (OSError, TypeError):
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}"


@cache
def import_reader(path: str) -> Reader:
    """The reader at ``module:name``: a `Reader`, or a function as `register_reader` takes it.

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
    return Reader(_always, found)


def read_record(
    record: Any, source: Source, media_root: str | None = None, *, reader: str | None = None
) -> Conversation:
    """Read a record in whatever format it has.

    Args:
        media_root: folder that relative media paths start at.
        reader: name of the format, or the import path of one's own; None is the one that the record was told
            (`Told`), else recognises it.

    Raises:
        DataError: no reader knows the record, or its content is malformed.
    """
    told = _resolved(record, source, media_root, reader, until=None)
    assert isinstance(told, Conversation)
    return told


def read_to_dense(record: Any, source: Source, media_root: str | None = None) -> Conversation | Record:
    """As `read_record`, but a dense-caption record, or one that a reader makes of a record, stays a record.

    Dense captions are read in groups (data/dense), not one by one.
    """
    return _resolved(record, source, media_root, None, until="dense")


def _resolved(
    record: Any, source: Source, media_root: str | None, reader: str | None, until: str | None
) -> Conversation | Record:
    """A record read by one format after the other, up to a conversation or to the format ``until``."""
    if not isinstance(record, dict):
        raise DataError(f"{source}: a record is a JSON object, this is a {type(record).__name__}.")
    name = reader or (record.reader if isinstance(record, Told) else None)
    told: Conversation | Record = record
    asked: list[str] = []
    while isinstance(told, dict):
        if name is None:
            name = next((key for key, known in READERS.items() if key not in asked and known.matches(told)), None)
        if name is None:
            raise DataError(f"{source}: {_unknown(told)}")
        if name == until:
            return told
        reader_of = READERS[name] if name in READERS else _named(name, source)
        told = _checked(reader_of.read(told, source, media_root), told, name, source)
        asked.append(name)
        name = None
    return told


def _named(name: str, source: Source) -> Reader:
    if ":" in name:
        return import_reader(name)
    raise DataError(f"{source}: unknown format {name!r}.{hint(name, READERS)}")


def _checked(told: Any, record: Record, name: str, source: Source) -> Conversation | Record:
    """What a reader gave; the record itself where it passed it on."""
    if told is None:
        return record
    if not isinstance(told, (Conversation, dict)):
        raise DataError(f"{source}: the reader {name!r} gave a {type(told).__name__}, not a Conversation or a record.")
    return told


def _always(record: Record) -> bool:
    return True


def _unknown(record: Record) -> str:
    """What is said of a record that no format knows: its keys, and the formats that it nearly has."""
    there = [str(key) for key, value in record.items() if value is not None]
    needs = [keys for reader in READERS.values() for keys in reader.needs]
    near = [told for keys in needs if (told := _near_miss(keys, there))]
    meant = f"Nearly: {'; '.join(dict.fromkeys(near))}. " if near else ""
    known = ", ".join(" + ".join(keys) for keys in dict.fromkeys(needs))
    return f"no format has the keys {', '.join(sorted(there)) or '(none)'}. {meant}Known: {known}."


def _near_miss(keys: tuple[str, ...], there: list[str]) -> str:
    """``'query' without 'response'``, or ``'mesages' instead of 'messages'``; empty where nothing is near."""
    have = [key for key in keys if key in there]
    close = {key: get_close_matches(key, there, n=1, cutoff=0.8) for key in keys if key not in have}
    if not have and not any(close.values()):
        return ""
    if missing := [key for key, other in close.items() if not other]:
        return f"{_quoted(have)} without {_quoted(missing)}" if have else ""
    return ", ".join(f"{other[0]!r} instead of {key!r}" for key, other in close.items())


def _quoted(keys: list[str]) -> str:
    return " and ".join(map(repr, keys))
