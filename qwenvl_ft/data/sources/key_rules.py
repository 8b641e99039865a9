"""What data.ignored_keys and data.label do to the records of a file, before any reader sees them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets.table import Table

from qwenvl_ft.data.sources.sampling import Rows
from qwenvl_ft.data.unread import LABELS, is_false
from qwenvl_ft.recipe.schema import DataConfig

KEEP_TRUE = "keep_true"


@dataclass(frozen=True)
class KeyRules:
    """How the keys of records are treated."""

    ignored: tuple[str, ...] = ()
    """Keys that are taken as absent: of a record, of its turns and of their parts."""
    label: str = "error"
    """`KEEP_TRUE` leaves out the records whose label is false."""

    @staticmethod
    def of(data: DataConfig) -> "KeyRules":
        return KeyRules(tuple(data.ignored_keys), data.label)

    def applied(self, record: Any) -> Any:
        """Return a record without the ignored keys."""
        return _without(record, frozenset(self.ignored)) if self.ignored else record

    def keeps(self, record: Any) -> bool:
        """Return False for a record that is left out."""
        judged = self.label == KEEP_TRUE and isinstance(record, dict)
        return not (judged and any(is_false(record[key]) for key in LABELS if key in record))

    def rows(self, table: Table) -> Rows:
        """Return the rows of a file's table that are kept."""
        everything = range(table.num_rows)
        if self.label != KEEP_TRUE:
            return everything
        rejected = [row for row, record in _labelled(table) if not self.keeps(record)]
        return np.delete(np.asarray(everything, dtype=np.int32), rejected) if rejected else everything


ALL_KEYS = KeyRules()
"""Ignores no key and leaves out no record."""


def _without(value: Any, ignored: frozenset[str]) -> Any:
    """Return a record without the keys, also in the objects that its lists hold; other objects stay whole."""
    if not isinstance(value, dict):
        return value
    kept = {key: entry for key, entry in value.items() if key not in ignored}
    return {
        key: [_without(member, ignored) for member in entry] if isinstance(entry, list) else entry
        for key, entry in kept.items()
    }


def _labelled(table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, record) of the rows with a label; of a table of columns the record is its labels alone."""
    names = table.column_names
    if labels := [key for key in LABELS if key in names]:
        yield from enumerate(table.select(labels).to_pylist())
    elif "text" in names and "place" in names:  # JSON as text, see files.py
        row = 0
        for chunk in table.column("text").chunks:
            for text in chunk:
                content = text.as_py() or ""  # a damaged row has none
                if any(f'"{key}"' in content for key in LABELS):
                    yield row, _json_or_none(content)
                row += 1


def _json_or_none(text: str) -> Any:
    """Return a record, or None for a text that is not JSON; opening the record reports it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
