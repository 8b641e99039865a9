"""The records of a selection as one memory-mapped list on disk: a million records cost no memory per process."""

import bisect
import hashlib
import operator
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets.table import Table

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.media.elsewhere import MEDIA_ROOT, MediaRoot
from qwenvl_ft.data.media.reading import image_keys_of, with_defaults
from qwenvl_ft.data.readers import RecordWithReader, code_state, own_readers, register_reader
from qwenvl_ft.data.record_size import large_rows, too_large
from qwenvl_ft.data.sources.files import MAX_BYTES, DataFile, default_cache, find_file, open_tables, row_of
from qwenvl_ft.data.sources.key_rules import ALL_KEYS, KeyRules
from qwenvl_ft.data.sources.registry import find_dataset, matching_files, parse_selection
from qwenvl_ft.data.sources.sampling import Rows, draw_rows, rates_of_weights, split_places, validation_mask
from qwenvl_ft.errors import DataError

ERROR = "error"
"""Value of ``data.media_outside_root`` that refuses all media outside their root."""
Selection = str | list[str] | Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """The selected rows of one file."""

    name: str
    """Name of the data set."""
    file: DataFile
    media_root: str
    reader: str | None
    """Format of the records, if the registry names one."""
    table: Table
    """The opened file, which pickles as its path."""
    key: str
    """Cache key of the file's content."""
    rows: Rows
    rules: KeyRules
    left_out: int = 0
    """Records of the file that `rules` leave out."""
    image_keys: dict[str, Any] = field(default_factory=dict)
    """How the data set's images are read, for records that do not say it."""
    max_bytes: int = MAX_BYTES
    """Most bytes of text of a record."""
    large: Mapping[int, int] = field(default_factory=dict)
    """Row -> bytes of the rows with more text."""
    address: str = ""
    """Where the file was copied from, for messages; empty if it is no copy."""
    digest: str = ""
    """Hash of the bytes of a shard; empty for a file that is no shard."""

    def record(self, place: int) -> tuple[Any, Source]:
        """Return a record and its origin; raise DataError if it is damaged."""
        row = int(self.rows[place])
        if row in self.large:
            raise too_large(f"{self.file.path}[{row}]", self.large[row], self.max_bytes)
        where, record = self.file.kind.record(row_of(self.table, row), self.file.path, row)
        where = where.replace(str(self.file.path), self.address, 1) if self.address else where
        if not isinstance(record, dict):
            return record, Source(self.name, where)
        record = self.rules.applied(record)
        record_id = "" if record.get("id") is None else str(record["id"])
        record = with_defaults(record, self.image_keys)
        return (RecordWithReader(record, self.reader) if self.reader else record), Source(self.name, where, record_id)


class Records:
    """``records[i]`` is (record, its `Source`, folder of its relative media paths).

    Pickles as paths and row numbers, so that a dataloader worker is cheap to start; custom readers are pickled too.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        key = hashlib.sha256()
        for name, reader in own_readers(part.reader for part in parts).items():
            key.update(f"{name}|{code_state(reader)}|".encode())
        for part in parts:
            root = f"{part.media_root}{_limit(part.media_root)}"
            key.update(f"{part.key}|{root}|{part.reader}|{part.rules.ignored}|{part.image_keys or ''}|".encode())
            key.update(str(part.rows).encode() if isinstance(part.rows, range) else part.rows.tobytes())
        self.fingerprint = key.hexdigest()
        """Cache key of the records' content and order."""
        self._ends: list[int] = np.cumsum([len(part.rows) for part in parts]).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"readers": own_readers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the records and register their custom readers, which a worker that was not forked does not have."""
        for name, reader in reversed(state.pop("readers").items()):
            register_reader(name, reader.matches, reader.read)
        self.__dict__.update(state)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: int) -> tuple[Any, Source, str | None]:
        place = operator.index(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"record {place} of {len(self)}")
        place %= len(self)
        number = bisect.bisect_right(self._ends, place)
        part = self.parts[number]
        record, source = part.record(place - (self._ends[number - 1] if number else 0))
        return record, source, part.media_root

    def summary(self) -> dict[str, int]:
        """Return data set -> number of records, including repeats."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts[part.name] += len(part.rows)
        return dict(counts)

    def left_out(self) -> int:
        """Return the number of records that `KeyRules` leave out of the selected files."""
        return sum({(part.name, str(part.file)): part.left_out for part in self.parts}.values())

    def sampled(self, count: int, seed: int = 0, *, repeat: bool = False) -> "Records":
        """Draw ``count`` records at random and keep their order.

        Args:
            repeat: if there are fewer than ``count``, take records more than once; False returns all of them.
        """
        if not repeat and count >= len(self):
            return self
        places = draw_rows(range(len(self)), count / len(self), f"{seed}:sample")
        return self._with_rows(split_places([part.rows for part in self.parts], places))

    def split(self, ratio: float, seed: int = 0) -> tuple["Records", "Records"]:
        """Split into (training, validation); about ``ratio`` of each file's rows, once each, are for validation.

        The two share no row of a file, even if the file is selected twice, repeated, or has two names.

        Raises:
            DataError: one of the two would be empty.
        """
        masks = [validation_mask(part.table.num_rows, ratio, seed)[np.asarray(part.rows)] for part in self.parts]
        rows = [np.asarray(part.rows, dtype=np.int32) for part in self.parts]
        train = self._with_rows([numbers[~mask] for numbers, mask in zip(rows, masks, strict=True)])
        val = self._with_rows([np.unique(numbers[mask]) for numbers, mask in zip(rows, masks, strict=True)])
        if not len(train) or not len(val):
            raise DataError(
                f"data.split_dataset_ratio={ratio:g} of {len(self)} records leaves {len(train)} for training and "
                f"{len(val)} for validation. Change it, or set data.val."
            )
        return train, val

    def mixed(self, others: "Records", ratio: float, seed: int = 0) -> "Records":
        """Add ``ratio`` times as many of the other records, repeating them if there are too few."""
        return Records(self.parts + others.sampled(round(len(self) * ratio), seed, repeat=True).parts)

    def _with_rows(self, rows: list[Rows]) -> "Records":
        parts = [replace(part, rows=numbers) for part, numbers in zip(self.parts, rows, strict=True)]
        return Records([part for part in parts if len(part.rows)])


def load_records(
    selection: Selection,
    *,
    seed: int = 0,
    media_root: str | None = None,
    media_outside_root: str | None = None,
    num_proc: int = 1,
    cache_dir: str | Path | None = None,
    skip: bool = False,
    rules: KeyRules = ALL_KEYS,
    max_record_bytes: int = MAX_BYTES,
) -> Records:
    """Open the data sets of a selection.

    ``a%50`` is half of a, drawn without replacement; ``a%200`` is a twice, ``a%150`` once plus a random half;
    ``a#1000`` is a thousand records of a. A pattern (``shards/*.tar``) is one data set of several files.
    ``{"a": 3, "b": 1}`` takes three records of a for each one of b, as many as possible without repeats. The draw
    depends on the seed and the data set's name only, so all ranks draw the same. Relative media paths start at the
    registered ``data_path``, else at ``media_root``, else at the folder of the file.

    Args:
        media_outside_root: ``error`` refuses media outside the folder of relative paths, whatever leads there;
            ``allow`` allows them; None refuses relative paths that climb out of a folder that was given.
        num_proc: number of new files copied to Arrow in parallel.
        rules: which keys and which records are left out; before the draw, so that a rate is a share of the others.
        cache_dir: folder of the Arrow files; None is ``qwenvl_ft`` in the folder of `datasets` (HF_DATASETS_CACHE).
        skip: a line, row or archive member that cannot be read is a record that raises DataError when it is read.
        max_record_bytes: a record with more text, media in base64 aside, cannot be read.

    Raises:
        DataError: a name or file does not exist, a file cannot be parsed (without ``skip``) or is empty, or a rate
            selects no record.
    """
    chosen = [(name, amount, find_dataset(name)) for name, amount in parse_selection(selection)]
    files = [[_file(name, path) for path in matching_files(entry["annotation_path"])] for name, _, entry in chosen]
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    opened = iter(
        open_tables(
            [file for several in files for file in several], folder, num_proc, skip=skip, max_bytes=max_record_bytes
        )
    )
    tables = [[next(opened) for _ in several] for several in files]
    spans = [[rules.rows(table) for table in several] for several in tables]
    sizes = [sum(map(len, several)) for several in spans]
    rates = _rates(selection, chosen, sizes)
    parts: list[Part] = []
    for (name, _, entry), rate, size, rows_of_files, several, opened_files in zip(
        chosen, rates, sizes, spans, files, tables, strict=True
    ):
        places = draw_rows(range(size), rate, f"{seed}:{name}")
        if not len(places):
            raise DataError(f"data set {name}: {rate * 100:g}% of {size} records is 0 records. Raise the rate.")
        taken = rows_of_files if rate == 1 else split_places(rows_of_files, places)
        for file, table, kept, rows in zip(several, opened_files, rows_of_files, taken, strict=True):
            if len(rows):
                part = part_of(name, entry, file, table, rules, kept, media_root, media_outside_root, max_record_bytes)
                parts.append(replace(part, rows=rows))
    return Records(parts)


def part_of(
    name: str,
    entry: Mapping[str, Any],
    file: DataFile,
    table: Table,
    rules: KeyRules,
    kept: Rows,
    media_root: str | None,
    media_outside_root: str | None,
    max_record_bytes: int,
) -> Part:
    """Return all kept rows of a file; for the settings see `load_records`.

    Args:
        entry: of the data set, from `find_dataset`.
        kept: rows that ``rules`` keep.
    """
    return Part(
        name,
        file,
        _media_root(name, entry, file, media_root, media_outside_root),
        entry.get("reader"),
        table,
        file.state,
        kept,
        rules,
        table.num_rows - len(kept),
        image_keys_of(entry),
        max_record_bytes,
        large_rows(table.table, max_record_bytes) if file.kind.has_columns else {},
    )


def _limit(root: str) -> str:
    """Return what the limit of a media root adds to a cache key."""
    return f"|{root.within}:{root.strict}" if isinstance(root, MediaRoot) and root.within else ""


def _rates(selection: Selection, chosen: list[tuple[str, Any, Any]], sizes: list[int]) -> list[float]:
    """Return the share of each data set's records that the selection takes.

    Raises:
        DataError: every record of a data set is left out.
    """
    for (name, _, _), size in zip(chosen, sizes, strict=True):
        if not size:
            raise DataError(f"data set {name}: every record has a false label, which data.label=keep_true leaves out.")
    rates = [
        amount / size if isinstance(amount, int) else amount for (_, amount, _), size in zip(chosen, sizes, strict=True)
    ]
    return rates_of_weights(sizes, rates) if isinstance(selection, Mapping) else rates


def _media_root(
    name: str, entry: Mapping[str, Any], file: DataFile, media_root: str | None, outside: str | None
) -> MediaRoot:
    """Return the folder of a file's relative media paths, with its limit (``data.media_outside_root``)."""
    folder = file.path if file.is_folder else file.path.parent
    own = entry["data_path"] or media_root
    path = os.path.abspath(own or folder)  # noqa: PTH100 - keeps symbolic links
    key = f"data.datasets.{name}.data_path" if entry["data_path"] else MEDIA_ROOT
    limited = outside == ERROR or (outside is None and bool(own))
    return MediaRoot(path, str(folder), key, path if limited else "", outside == ERROR)


def _file(name: str, path: str) -> DataFile:
    file = find_file(path)
    if file is None:
        raise DataError(f"data set {name}: {path} does not exist.")
    return file
