"""The records of a selection as one list on disk: memory-mapped, so that a million cost no memory per process.

``.json`` and ``.jsonl`` are kept as one column of raw JSON text and parsed on access: records of any mixture of shapes
come back exactly as they were written. Parquet stays in its own columns. The Arrow files are made once, in the cache of
`datasets`, and are made anew when a file's path, size or time of change differs; a key of the content would have to
read the whole file at every start.
"""

import bisect
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import MemoryMappedTable
from filelock import FileLock
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import Told
from qwenvl_ft.data.readers.json_text import read_json, read_jsonl
from qwenvl_ft.data.registry import find_dataset, parse_selection
from qwenvl_ft.errors import DataError

LAYOUT = 1
"""Raised whenever what an Arrow file holds changes its meaning."""
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 64 * 2**20
"""What is written to the Arrow file at a time; whichever comes first."""
PARQUET_RECORDS = 100
"""Parquet rows held at a time; they may carry images."""


@dataclass(frozen=True)
class Draw:
    """Which rows of a file a selection takes: all of them some times over, then a drawn rest."""

    size: int
    """Rows of the file."""
    whole: int
    """How often every row is taken."""
    rest: NDArray[np.int32]
    """Rows taken once more, in the file's order."""

    def __len__(self) -> int:
        return self.size * self.whole + self.rest.size

    def row(self, place: int) -> int:
        drawn = place - self.size * self.whole
        return place % self.size if drawn < 0 else int(self.rest[drawn])


@dataclass(frozen=True)
class Part:
    """One file of a selection."""

    name: str
    path: Path
    media_root: str
    reader: str | None
    """Format of its records, if the registry names one."""
    table: MemoryMappedTable
    """Columns ``place`` and ``text``, or a parquet file's own. Pickles as its path."""
    draw: Draw

    def record(self, place: int) -> tuple[Any, Source]:
        row = self.draw.row(place)
        raw: Any = self.table.fast_slice(row, 1).to_pylist()[0]
        if self.path.suffix == ".parquet":
            where, raw = f"{self.path}[{row}]", _without_none(raw)
        else:
            where = f"{self.path}{raw['place']}"
            try:
                raw = json.loads(raw["text"])
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON: {error}.") from None
        if not isinstance(raw, dict):
            return raw, Source(self.name, where)
        record_id = "" if raw.get("id") is None else str(raw["id"])
        return (Told(raw, self.reader) if self.reader else raw), Source(self.name, where, record_id)


class Records:
    """``records[i]`` -> (record, where it came from, folder of its relative media).

    Pickles as paths and drawn rows, so that a worker costs next to nothing.
    """

    def __init__(self, parts: list[Part], fingerprint: str) -> None:
        self.parts = parts
        self.fingerprint = fingerprint
        """Key of the records' content and order, for caches."""
        self._ends: list[int] = np.cumsum([len(part.draw) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

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
        """Name -> number of records, repeats counted."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts[part.name] += len(part.draw)
        return dict(counts)


def load_records(
    selection: str | list[str],
    *,
    seed: int = 0,
    media_root: str | None = None,
    num_proc: int = 1,
    cache_dir: str | Path | None = None,
) -> Records:
    """Open the data sets of a selection.

    ``a%50`` is half of a, drawn without replacement; ``a%200`` is a twice, ``a%150`` once and a drawn half. What is
    drawn depends on the seed and the data set's name only, so all processes draw alike. Media start at the registered
    ``data_path``, else at ``media_root``, else beside the file.

    Args:
        num_proc: files that are copied to Arrow at once, where several are new.
        cache_dir: folder of the Arrow files; None is ``qwenvl_ft`` in the folder of `datasets` (HF_DATASETS_CACHE).

    Raises:
        DataError: a name or file does not exist, a file cannot be parsed, it is empty, or its rate takes no record.
    """
    chosen = [(name, rate, find_dataset(name)) for name, rate in parse_selection(selection)]
    paths = [Path(entry["annotation_path"]) for _, _, entry in chosen]
    for (name, _, _), path in zip(chosen, paths, strict=True):
        if not path.is_file():
            raise DataError(f"data set {name}: {path} does not exist.")
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "qwenvl_ft"
    parts, key = [], hashlib.sha256()
    for (name, rate, entry), path, table in zip(chosen, paths, _open(paths, folder, num_proc), strict=True):
        root = os.path.abspath(entry["data_path"] or media_root or path.parent)  # noqa: PTH100 - keeps symbolic links
        draw = _sample(table.num_rows, rate, f"{seed}:{name}")
        if not len(draw):
            raise DataError(f"data set {name}: {rate * 100:g}% of {table.num_rows} records is none. Raise the rate.")
        parts.append(Part(name, path, root, entry.get("reader"), table, draw))
        key.update(f"{_state(path)}|{root}|{entry.get('reader')}|{draw.whole}|".encode() + draw.rest.tobytes())
    return Records(parts, key.hexdigest())


def _sample(size: int, rate: float, key: str) -> Draw:
    """Every row for each whole hundred percent, and a seeded draw (in order) for the rest."""
    whole, rest = divmod(rate, 1.0)
    drawn = round(rest * size)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    extra = np.sort(rng.permutation(size)[:drawn]) if drawn else np.empty(0)
    return Draw(size, int(whole), extra.astype(np.int32))


def _without_none(value: Any) -> Any:
    """Without the None fields that a column's type adds where records differ."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _state(path: Path) -> str:
    """Changes when the file does: path, size, time of change."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _open(paths: list[Path], folder: Path, num_proc: int) -> list[MemoryMappedTable]:
    """Each file as a memory-mapped table; what is new is copied first."""
    new = [path for path in dict.fromkeys(paths) if not _target(path, folder).exists()]
    if min(num_proc, len(new)) > 1:
        with ProcessPoolExecutor(min(num_proc, len(new))) as pool:
            list(pool.map(_copied, new, [folder] * len(new)))
    return [MemoryMappedTable.from_file(str(_copied(path, folder))) for path in paths]


def _target(path: Path, folder: Path) -> Path:
    return folder / f"records-{hashlib.sha256(f'{LAYOUT}:{_state(path)}'.encode()).hexdigest()[:32]}.arrow"


def _copied(path: Path, folder: Path) -> Path:
    """The file's Arrow copy; of several processes one makes it, the others wait."""
    target = _target(path, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _write(path, target)
    except OSError as error:
        raise DataError(
            f"{path} cannot be copied to {folder}: {error.strerror or error}. Set HF_DATASETS_CACHE to a folder with "
            "room."
        ) from None
    return target


def _write(path: Path, target: Path) -> None:
    partial = target.with_suffix(f".{os.getpid()}.partial")
    schema, batches = _parquet(path) if path.suffix == ".parquet" else _text(path)
    count = 0
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += batch.num_rows
        if not count:
            raise DataError(f"{path} has no record.")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _text(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Where each record stands in its file, and its JSON."""
    schema = pa.schema({"place": pa.string(), "text": pa.large_string()})
    return schema, _batches(read_jsonl(path) if path.suffix == ".jsonl" else read_json(path), schema)


def _batches(records: Iterable[tuple[str, str]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    places: list[str] = []
    texts: list[str] = []
    size = 0
    for place, text in records:
        places.append(place)
        texts.append(text)
        size += len(text)
        if len(texts) >= BATCH_RECORDS or size >= BATCH_CHARACTERS:
            yield pa.record_batch([places, texts], schema=schema)
            places, texts, size = [], [], 0
    yield pa.record_batch([places, texts], schema=schema)


def _parquet(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as .parquet: {' '.join(str(error).split())[:200]}.") from None
    return file.schema_arrow, _parquet_batches(file, path)


def _parquet_batches(file: pq.ParquetFile, path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=PARQUET_RECORDS)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())[:200]}.") from None
