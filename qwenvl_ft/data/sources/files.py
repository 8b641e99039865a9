"""Open files of records as memory-mapped Arrow tables; `KINDS` has one entry per file type.

Text files (``.json``, ``.jsonl``, ``.csv``, ``.tsv``) become a column of raw JSON that is parsed on access, so that
records of different shapes in one file come back exactly as they were written. Parquet files and folders of `datasets`
keep their columns. For a ``.tar`` the table holds the offsets of its members; their bytes are read on access and never
copied. The Arrow files are written once, to the cache of `datasets`, and again when a file's path, size or modification
time changes; a hash of the content would have to read the whole file at every start.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import MemoryMappedTable, Table
from filelock import FileLock

from qwenvl_ft.data.sources.coco_files import read_coco
from qwenvl_ft.data.sources.csv_files import read_table
from qwenvl_ft.data.sources.damage import COLUMN, Batch, Damage, EmptyError, intact, marked
from qwenvl_ft.data.sources.json_files import MAX_BYTES, Entry, opens_object, parse_json, read_json, read_jsonl
from qwenvl_ft.data.sources.tar_files import MEMBERS, read_tar, tar_record
from qwenvl_ft.errors import DataError, hint, one_line

LAYOUT = 2
"""Version of the Arrow files' content; raise it when that changes, so that old files are not used."""
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 64 * 2**20
"""Size of a record batch written to the Arrow file; whichever limit is reached first."""
PARQUET_RECORDS = 100
"""Parquet rows held in memory at a time; they may contain images."""
TURNS = ("conversations", "messages", "texts")
"""Keys of lists of turns, which `datasets` stores as one struct of lists."""

Row = dict[str, Any]
Batches = tuple[pa.Schema, Iterator[Batch]]


@dataclass(frozen=True)
class Kind:
    """One file type."""

    batches: Callable[[Path, int], Batches]
    """(file, most bytes of a record) -> schema and record batches of its Arrow copy, with the damage between them."""
    record: Callable[[Row, Path, int], tuple[str, Any]]
    """(row of the table, file, row number) -> place of the record for messages, and the record."""
    has_columns: bool = False
    """True if the table keeps the file's columns."""


@dataclass(frozen=True)
class DataFile:
    """A file, or a split of a folder that `datasets` saved."""

    path: Path
    split: str = ""
    is_folder: bool = False

    @property
    def kind(self) -> Kind:
        return FOLDER if self.is_folder else KINDS[self.path.suffix]

    @property
    def state(self) -> str:
        """Path, size and modification time: a cache key that changes when the content does."""
        files = _folder_files(self.path, self.split) if self.is_folder else [self.path]
        stats = [(str(file.resolve()), file.stat()) for file in files]
        return "|".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def __str__(self) -> str:
        return f"{self.path}:{self.split}" if self.split else str(self.path)


def find_file(text: str) -> DataFile | None:
    """Return the file or folder at a path or ``folder:split``; None if there is none.

    Raises:
        DataError: the folder was not saved by `datasets`, or has no such split.
    """
    path = Path(text)
    if path.is_file():
        return DataFile(path) if path.suffix in KINDS else None
    if path.is_dir():
        return DataFile(path, _checked_split(path, ""), is_folder=True)
    folder, colon, split = text.rpartition(":")
    if not colon or not Path(folder).is_dir():
        return None
    return DataFile(Path(folder), _checked_split(Path(folder), split), is_folder=True)


def open_tables(
    files: list[DataFile], folder: Path, num_proc: int, *, skip: bool = False, max_bytes: int = MAX_BYTES
) -> list[Table]:
    """Open each file as a memory-mapped table.

    Args:
        folder: cache folder of the Arrow files; ``num_proc`` processes copy new files to it.
        skip: rows that cannot be read become rows that raise in `row_of`.
        max_bytes: a record with more text cannot be read; rows of columns are left to `large_rows`.

    Raises:
        DataError: a file cannot be read, is empty, or the cache cannot be written.
    """
    copied = [file for file in dict.fromkeys(files) if not file.is_folder]
    new = [file for file in copied if not _target(file, folder, max_bytes).exists()]
    if min(num_proc, len(new)) > 1:
        with ProcessPoolExecutor(min(num_proc, len(new))) as pool:
            list(pool.map(partial(_arrow_copy, folder=folder, skip=skip, max_bytes=max_bytes), new))
    return [_open_table(file, folder, skip, max_bytes) for file in files]


def row_of(table: Table, number: int) -> Row:
    """Return a row of a table from `open_tables`.

    Raises:
        DataError: the row is damaged.
    """
    row: Row = table.fast_slice(number, 1).to_pylist()[0]
    if damage := row.pop(COLUMN, None):
        raise DataError(damage)
    return row


def default_cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "qwenvl_ft"


def _open_table(file: DataFile, folder: Path, skip: bool, max_bytes: int) -> Table:
    if not file.is_folder:
        return MemoryMappedTable.from_file(str(_arrow_copy(file, folder, skip, max_bytes)))
    try:
        saved: Any = datasets.load_from_disk(str(file.path / file.split), keep_in_memory=False)
    except Exception as error:  # of any type: json, Arrow and datasets errors come through
        raise DataError(f"{file} cannot be opened: {one_line(error, 200)}.") from None
    if not len(saved):
        raise DataError(f"{file} has no records.")
    return saved.data


def _target(file: DataFile, folder: Path, max_bytes: int) -> Path:
    content = file.state if file.kind.has_columns else f"{max_bytes}:{file.state}"
    return folder / f"records-{hashlib.sha256(f'{LAYOUT}:{content}'.encode()).hexdigest()[:32]}.arrow"


def _arrow_copy(file: DataFile, folder: Path, skip: bool, max_bytes: int) -> Path:
    """Return the file's Arrow copy; if several processes need it, one writes it while the others wait."""
    target = _target(file, folder, max_bytes)
    damaged = target.with_suffix(".damaged.arrow")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.exists() or (skip and damaged.exists()):
                return target if target.exists() else damaged
            try:
                schema, batches = file.kind.batches(file.path, max_bytes)
                _write(file, target, schema, intact(batches))
            except DataError:
                if not skip:
                    raise
                _write(file, damaged, *_with_damage(file, max_bytes))
                return damaged
    except (OSError, NotImplementedError) as error:  # the latter by filelock, on a disk without flock
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{file} cannot be copied to {folder}: {reason}. Set HF_DATASETS_CACHE to a folder on a local disk with "
            "enough space."
        ) from None
    return target


def _with_damage(file: DataFile, max_bytes: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the content of a damaged file; one damaged row if nothing of it can be read."""
    try:
        return marked(*file.kind.batches(file.path, max_bytes))
    except DataError as error:
        return marked(pa.schema([]), [Damage(error, last=True)])


def _write(file: DataFile, target: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}.partial")
    count = 0
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += batch.num_rows
        if not count:
            raise EmptyError(f"{file} has no records.")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


# -- text ----------------------------------------------------------------------------------------------------------


def _open_text(path: Path, max_bytes: int, read: Callable[[Path, int], Iterator[Entry]]) -> Batches:
    """Return batches with the place and the JSON text of each record."""
    schema = pa.schema({"place": pa.string(), "text": pa.large_string()})
    return schema, _record_batches(read(path, max_bytes), schema)


def _list_or_coco(path: Path, max_bytes: int) -> Iterator[Entry]:
    """Read a .json file: a list of records, or a single object, which is a COCO detection file."""
    return read_coco(path, max_bytes) if opens_object(path) else read_json(path, max_bytes)


def _text_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    where = f"{path}{row['place']}"
    return where, parse_json(row["text"], where)


def _record_batches(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> Iterator[Batch]:
    """Group (place, text, ...) rows into record batches; an error in place of a text is damage."""
    pending: list[tuple[Any, ...]] = []
    size = 0
    for row in _to_the_end(rows):
        damage = row if isinstance(row, Damage) else Damage(row[1]) if isinstance(row[1], DataError) else None
        if damage is None:
            pending.append(row)
            size += len(row[1])
        if pending and (damage or len(pending) >= BATCH_RECORDS or size >= BATCH_CHARACTERS):
            yield _record_batch(pending, schema)
            pending, size = [], 0
        if damage is not None:
            yield damage
    if pending:
        yield _record_batch(pending, schema)


def _to_the_end(rows: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield the rows; an error that ends them is yielded as damage."""
    try:
        yield from rows
    except DataError as error:
        yield Damage(error, last=True)


def _record_batch(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=schema)


# -- columns -------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path, max_bytes: int) -> Batches:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as .parquet: {one_line(error, 200)}.") from None
    return file.schema_arrow, _parquet_batches(file, path)


def _parquet_batches(file: pq.ParquetFile, path: Path) -> Iterator[Batch]:
    """Yield the rows of one row group after another; of a damaged group, those before the damage."""
    for group in range(file.num_row_groups):
        rest = file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=PARQUET_RECORDS, row_groups=[group]):
                rest -= batch.num_rows
                yield batch
        except (pa.ArrowException, OSError) as error:
            yield Damage(DataError(f"{path} is damaged: {one_line(error, 200)}."), rows=rest)


def _column_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    record = _without_none(row)
    return f"{path}[{number}]", record | {key: _turns(record[key]) for key in TURNS if key in record}


def _without_none(value: Any) -> Any:
    """Remove the None fields that a column's type adds where records have different keys."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _turns(value: Any) -> Any:
    """Convert ``{"from": ["human", "gpt"], "value": [...]}`` to a list of turns; return anything else unchanged."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    turns = [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    return [_without_none(turn) for turn in turns]


# -- folders of `datasets` -----------------------------------------------------------------------------------------


def _checked_split(folder: Path, split: str) -> str:
    if (folder / "state.json").is_file() and not split:
        return ""
    splits = _splits(folder)
    if splits and split in splits:
        return split
    if splits and not split:
        raise DataError(f"{folder} has the splits {', '.join(splits)}. Choose one: {folder}:{splits[0]}.")
    if splits:
        raise DataError(f"{folder} has no split {split!r}.{hint(split, splits)}")
    problem = "has no splits" if split else "was not written by Dataset.save_to_disk"
    raise DataError(f"{folder} {problem}. Give a file, or such a folder with its split: {folder.name}:train.")


def _splits(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _folder_files(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).glob("*.arrow")) + [folder / split / "state.json"]


def _no_copy(path: Path, max_bytes: int) -> Batches:
    raise AssertionError(f"{path} is already in Arrow format")


# -- tar -----------------------------------------------------------------------------------------------------------


def _open_tar(path: Path, max_bytes: int) -> Batches:
    schema = pa.schema({"place": pa.string(), "text": pa.large_string(), "members": MEMBERS})
    rows = ((record.place, record.text, record.members) for record in read_tar(path, max_bytes))
    return schema, _record_batches(rows, schema)


def _tar_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    where, record = _text_record(row, path, number)
    return where, tar_record(record, row["members"], path)


FOLDER = Kind(_no_copy, _column_record, has_columns=True)
KINDS: dict[str, Kind] = {
    ".json": Kind(partial(_open_text, read=_list_or_coco), _text_record),
    ".jsonl": Kind(partial(_open_text, read=read_jsonl), _text_record),
    ".parquet": Kind(_open_parquet, _column_record, has_columns=True),
    ".csv": Kind(partial(_open_text, read=read_table), _text_record),
    ".tsv": Kind(partial(_open_text, read=read_table), _text_record),
    ".tar": Kind(_open_tar, _tar_record),
}
"""File extension -> file type."""
