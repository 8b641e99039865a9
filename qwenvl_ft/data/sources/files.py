"""Everything that may hold records on disk, as memory-mapped Arrow tables: one entry of `KINDS` for each kind of file.

Text (``.json``, ``.jsonl``, ``.csv``, ``.tsv``) becomes a column of raw JSON and is parsed on access: records of any
mixture of shapes come back exactly as they were written. Parquet and folders of `datasets` stay in their own columns.
Of a ``.tar`` the table holds the places of its members; their bytes are read on access and never copied. The Arrow
files are made once, in the cache of `datasets`, and are made anew when a file's path, size or time of change differs;
a key of the content would have to read the whole file at every start.
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

from qwenvl_ft.data.readers.coco import read_coco
from qwenvl_ft.data.readers.json_text import opens_object, read_json, read_jsonl
from qwenvl_ft.data.readers.table_text import read_table
from qwenvl_ft.data.readers.tar import MEMBERS, read_tar, tar_record
from qwenvl_ft.errors import DataError, hint, one_line

LAYOUT = 2
"""Raised whenever what an Arrow file holds changes its meaning."""
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 64 * 2**20
"""What is written to the Arrow file at a time; whichever comes first."""
PARQUET_RECORDS = 100
"""Parquet rows held at a time; they may carry images."""
TURNS = ("conversations", "messages", "texts")
"""Lists of turns; `datasets` keeps a Sequence of them as one struct of lists."""

Row = dict[str, Any]
Batches = tuple[pa.Schema, Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    batches: Callable[[Path], Batches]
    """What its Arrow file holds."""
    record: Callable[[Row, Path, int], tuple[str, Any]]
    """(row of the table, file, number of the row) -> where the record stands, and the record."""


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
        """Changes when the content does: path, size, time of change."""
        files = _folder_files(self.path, self.split) if self.is_folder else [self.path]
        stats = [(str(file.resolve()), file.stat()) for file in files]
        return "|".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def __str__(self) -> str:
        return f"{self.path}:{self.split}" if self.split else str(self.path)


def find_file(text: str) -> DataFile | None:
    """The file or folder that a path names, ``folder:split`` included; None if there is none.

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


def open_tables(files: list[DataFile], folder: Path, num_proc: int) -> list[Table]:
    """Each file as a memory-mapped table; what is new is copied first, by ``num_proc`` processes.

    Raises:
        DataError: a file cannot be read, is empty, or the cache cannot be written.
    """
    new = [file for file in dict.fromkeys(files) if not file.is_folder and not _target(file, folder).exists()]
    if min(num_proc, len(new)) > 1:
        with ProcessPoolExecutor(min(num_proc, len(new))) as pool:
            list(pool.map(_copied, new, [folder] * len(new)))
    return [_open(file, folder) for file in files]


def default_cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "qwenvl_ft"


def _open(file: DataFile, folder: Path) -> Table:
    if not file.is_folder:
        return MemoryMappedTable.from_file(str(_copied(file, folder)))
    try:
        saved: Any = datasets.load_from_disk(str(file.path / file.split), keep_in_memory=False)
    except Exception as error:  # of any type: json, Arrow and datasets errors come through
        raise DataError(f"{file} cannot be opened: {one_line(error, 200)}.") from None
    if not len(saved):
        raise DataError(f"{file} has no record.")
    return saved.data


def _target(file: DataFile, folder: Path) -> Path:
    return folder / f"records-{hashlib.sha256(f'{LAYOUT}:{file.state}'.encode()).hexdigest()[:32]}.arrow"


def _copied(file: DataFile, folder: Path) -> Path:
    """The file's Arrow copy; of several processes one makes it, the others wait."""
    target = _target(file, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _write(file, target)
    except OSError as error:
        raise DataError(
            f"{file} cannot be copied to {folder}: {error.strerror or error}. Set HF_DATASETS_CACHE to a folder with "
            "room."
        ) from None
    return target


def _write(file: DataFile, target: Path) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}.partial")
    schema, batches = file.kind.batches(file.path)
    count = 0
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += batch.num_rows
        if not count:
            raise DataError(f"{file} has no record.")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


# -- text ----------------------------------------------------------------------------------------------------------


def _text(path: Path, read: Callable[[Path], Iterator[tuple[str, str]]]) -> Batches:
    """Where each record stands in its file, and its JSON."""
    schema = pa.schema({"place": pa.string(), "text": pa.large_string()})
    return schema, _batches(read(path), schema)


def _list_or_coco(path: Path) -> Iterator[tuple[str, str]]:
    """A .json file is a list of records, or one object: a detection set in COCO's form."""
    return read_coco(path) if opens_object(path) else read_json(path)


def _text_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    where = f"{path}{row['place']}"
    try:
        return where, json.loads(row["text"])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from None


def _batches(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows as (place, text, ...) in record batches."""
    held: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row[1])
        if len(held) >= BATCH_RECORDS or size >= BATCH_CHARACTERS:
            yield _batch(held, schema)
            held, size = [], 0
    if held:
        yield _batch(held, schema)


def _batch(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=schema)


# -- columns -------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Batches:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as .parquet: {one_line(error, 200)}.") from None
    return file.schema_arrow, _parquet_batches(file, path)


def _parquet_batches(file: pq.ParquetFile, path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=PARQUET_RECORDS)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {one_line(error, 200)}.") from None


def _column_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    record = _without_none(row)
    return f"{path}[{number}]", record | {key: _turns(record[key]) for key in TURNS if key in record}


def _without_none(value: Any) -> Any:
    """Without the None fields that a column's type adds where records differ."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _turns(value: Any) -> Any:
    """``{"from": ["human", "gpt"], "value": [...]}`` as a list of turns; anything else as it is."""
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
    told = "has no splits" if split else "is no folder that Dataset.save_to_disk wrote"
    raise DataError(f"{folder} {told}. Give a file, or such a folder with its split: {folder.name}:train.")


def _splits(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _folder_files(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).glob("*.arrow")) + [folder / split / "state.json"]


def _no_copy(path: Path) -> Batches:
    raise AssertionError(f"{path} is Arrow already")


# -- tar -----------------------------------------------------------------------------------------------------------


def _tar(path: Path) -> Batches:
    schema = pa.schema({"place": pa.string(), "text": pa.large_string(), "members": MEMBERS})
    return schema, _batches(((sample.place, sample.text, sample.members) for sample in read_tar(path)), schema)


def _tar_record(row: Row, path: Path, number: int) -> tuple[str, Any]:
    where, record = _text_record(row, path, number)
    return where, tar_record(record, row["members"], path)


FOLDER = Kind(_no_copy, _column_record)
KINDS: dict[str, Kind] = {
    ".json": Kind(partial(_text, read=_list_or_coco), _text_record),
    ".jsonl": Kind(partial(_text, read=read_jsonl), _text_record),
    ".parquet": Kind(_parquet, _column_record),
    ".csv": Kind(partial(_text, read=read_table), _text_record),
    ".tsv": Kind(partial(_text, read=read_table), _text_record),
    ".tar": Kind(_tar, _tar_record),
}
"""Ending of a file's name -> how it is read."""
