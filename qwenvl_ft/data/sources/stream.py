"""Reads shards in turn, a window of records at a time, and keeps on disk only the shards of the latest windows.

A round is one time through all shards, in an order that the seed and the round's number give. A window is the next
``window`` records of that order; the last one of a round is shorter. What a window holds is a function of (shards,
seed, position) alone, so every rank reads the same one, and a resumed run reads it again without the shards before it.
"""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_ft.data.sources.damage import EmptyError
from qwenvl_ft.data.sources.files import find_file, open_tables
from qwenvl_ft.data.sources.records import Part, part_of
from qwenvl_ft.data.sources.registry import DATASETS, UNLISTED
from qwenvl_ft.data.sources.shards import Shard, digest_of, fetch, folder_of
from qwenvl_ft.errors import DataError

ORDER = 5
"""Stream of random numbers for the order of the shards; those of `dense.groups` have 1 to 3."""

logger = logging.getLogger("qwenvl_ft.data")


class Position(NamedTuple):
    """A place in a stream; the records before it were read."""

    round: int = 0
    shard: int = 0
    """Place in the round's order."""
    record: int = 0
    """Record of that shard."""


class Stream:
    """The records of shards, read in windows.

    Args:
        window: records of a window.
        folder: copies of shards lie below it; all processes of a machine share it.
        options: as for `load_records`: seed, media_root, media_outside_root, skip, rules and max_record_bytes.
    """

    def __init__(self, window: int, folder: Path, options: dict[str, Any]) -> None:
        self.window = window
        self.folder = folder
        self.options = options
        self._opened: dict[str, Part | None] = {}

    def order(self, shards: Sequence[Shard], number: int) -> list[Shard]:
        """Return the shards in the order of a round."""
        order = np.random.default_rng([ORDER, self.options["seed"], number]).permutation(len(shards))
        return [shards[place] for place in order]

    def read(self, begin: Position, shards: Sequence[Shard]) -> tuple[list[Part], Position]:
        """Return the window at a position, and where the next one begins.

        Returns:
            The window's rows of each shard, in order, and the next position. They are empty if the rest of the round
            has no record.

        Raises:
            DataError: a shard cannot be copied or read, or has fewer records than when the position was reached.
        """
        order = self.order(shards, begin.round)
        place, record, room = begin.shard, begin.record, self.window
        parts: list[Part] = []
        while room and place < len(order):
            whole = self._open(order[place])
            count = 0 if whole is None else len(whole.rows)
            if record > count:
                raise DataError(
                    f"the shard {order[place].address} has {count:,} records, but {record:,} of it were read before. "
                    "Put the original back, or give a changed shard a new name."
                )
            taken = min(room, count - record)
            if whole is not None and taken:
                left_out = 0 if record else whole.left_out
                parts.append(replace(whole, rows=whole.rows[record : record + taken], left_out=left_out))
            room, record = room - taken, record + taken
            if record == count:
                place, record = place + 1, 0
        return parts, Position(begin.round, place, record) if place < len(order) else Position(begin.round + 1)

    def keep(self, addresses: Iterable[str], *, evict: bool) -> None:
        """Close all other shards.

        Args:
            evict: remove their copies too. Only one process of a machine may do so, and it must be the one that reads
                ahead, if any does.
        """
        kept = set(addresses)
        self._opened = {address: part for address, part in self._opened.items() if address in kept}
        places = {folder_of(address, self.folder) for address in kept}
        for place in (self.folder / "shards").glob("*") if evict else ():
            if place not in places:
                shutil.rmtree(place, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # a worker reads windows that are open

    def _open(self, shard: Shard) -> Part | None:
        """Return all records of a shard; None for an empty one that is left out."""
        if shard.address not in self._opened:
            self._opened[shard.address] = self._read(shard)
        return self._opened[shard.address]

    def _read(self, shard: Shard) -> Part | None:
        options = self.options
        name, address = shard
        file = find_file(str(fetch(address, self.folder)))
        assert file is not None  # `list_shards` takes known extensions only
        limit = options["max_record_bytes"]
        try:
            cache = folder_of(address, self.folder)
            [table] = open_tables([file], cache, 1, skip=options["skip"], max_bytes=limit)
        except EmptyError:
            if not options["skip"]:
                raise DataError(
                    f"the shard {address} has no records. Remove it, or set data.on_error=skip to pass over it."
                ) from None
            logger.warning("left out: %s has no records", address)
            return None
        entry = {"data_path": ""} | (UNLISTED | DATASETS).get(name, {})
        rules = options["rules"]
        roots = options["media_root"], options["media_outside_root"]
        part = part_of(name, entry, file, table, rules, rules.rows(table), *roots, limit)
        return replace(part, address=address, digest=digest_of(file.path))
