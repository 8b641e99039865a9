"""The records of a selection as one list on disk: memory-mapped, so that a million cost no memory per process.

``.json`` and ``.jsonl`` are kept as one column of raw JSON text and parsed on access: records of any mixture of shapes
come back exactly as they were written. Parquet stays in its own columns. The Arrow files are made once by `datasets`,
under its cache and its locks, and are made anew when a file's size or time of change differs.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.registry import find_dataset, parse_selection
from qwenvl_ft.errors import DataError


@dataclass(frozen=True)
class Part:
    """One file of a selection."""

    name: str
    path: Path
    media_root: str | None
    table: Any
    """A `datasets.Dataset` that yields Arrow: column ``text``, or a parquet file's own columns."""

    def record(self, row: int) -> tuple[dict[str, Any], Source]:
        raw = self.table[int(row)].to_pylist()[0]
        lines = self.path.suffix == ".jsonl"
        where = f"{self.path}:{row + 1}" if lines else f"{self.path}[{row}]"
        if self.path.suffix != ".parquet":
            try:
                raw = json.loads(raw["text"])
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON: {error}.") from None
        record_id = raw.get("id") if isinstance(raw, dict) else None
        return raw, Source(self.name, where, "" if record_id is None else str(record_id))


class Records:
    """``records[i]`` -> (record, where it came from, folder of its relative media). Pickles small."""

    def __init__(self, parts: list[Part], index: NDArray[np.int64], fingerprint: str) -> None:
        self.parts = parts
        self.index = index
        """int64[R, 2]: part and row of each record."""
        self.fingerprint = fingerprint
        """Key of the records' content and order, for caches."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> tuple[dict[str, Any], Source, str | None]:
        part, row = self.index[place]
        record, source = self.parts[part].record(int(row))
        return record, source, self.parts[part].media_root

    def summary(self) -> dict[str, int]:
        """Name -> number of records, repeats counted."""
        counts = Counter(self.index[:, 0].tolist())
        return {part.name: counts[number] for number, part in enumerate(self.parts)}


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

    Raises:
        DataError: a name or file does not exist, a file cannot be parsed, or it is empty.
    """
    parts: list[Part] = []
    rows, keys = [], [f"{seed}"]
    for name, rate in parse_selection(selection):
        entry = find_dataset(name)
        path = Path(entry["annotation_path"])
        if not path.is_file():
            raise DataError(f"data set {name}: {path} does not exist.")
        table, usable = _open(path, num_proc, cache_dir)
        if usable.size == 0:
            raise DataError(f"data set {name}: {path} has no record.")
        root = entry["data_path"] or media_root or str(path.parent)
        chosen = _sample(usable, rate, f"{seed}:{name}")
        rows.append(np.stack([np.full(chosen.size, len(parts)), chosen], axis=1))
        parts.append(Part(name, path, root, table))
        keys.append(f"{name}:{rate}:{root}:{_state(path)}")
    fingerprint = hashlib.sha256("|".join(keys).encode()).hexdigest()
    return Records(parts, np.concatenate(rows), fingerprint)


def _sample(rows: NDArray[np.int64], rate: float, key: str) -> NDArray[np.int64]:
    """Rows repeated for every whole hundred percent, and a seeded draw (in order) for the rest."""
    whole, rest = divmod(rate, 1.0)
    drawn = round(rest * rows.size)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    extra = rows[np.sort(rng.permutation(rows.size)[:drawn])] if drawn else rows[:0]
    return np.concatenate([*[rows] * int(whole), extra])


def _state(path: Path) -> str:
    """Changes when the file does: path, size, time of change."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _open(path: Path, num_proc: int, cache_dir: str | Path | None) -> tuple[Any, NDArray[np.int64]]:
    """The file as a memory-mapped table, and the rows of it that hold a record (blank lines do not)."""
    kind = "parquet" if path.suffix == ".parquet" else "text"
    cache = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE)
    source = path if path.suffix != ".json" else _as_lines(path, cache / "qwenvl_ft")
    options: dict[str, Any] = {} if kind == "parquet" else {"encoding": "utf-8-sig"}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            kind, data_files=str(source), split="train", cache_dir=str(cache), **options
        ).with_format("arrow")
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} cannot be read as {path.suffix}: {' '.join(str(cause).split())[:200]}.") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    if kind == "parquet":
        return table, np.arange(len(table))
    blank = [pc.equal(pc.utf8_trim_whitespace(chunk), "") for chunk in table.data.column("text").chunks]
    keep = ~np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in blank]) if blank else np.zeros(0, bool)
    return table, np.flatnonzero(keep)


def _as_lines(path: Path, folder: Path) -> Path:
    """A .json list as one record a line, made once; of several processes one makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(_state(path).encode()).hexdigest()[:32]}.jsonl"
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        try:
            records = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}. One record a line is .jsonl.") from None
        if not isinstance(records, list):
            raise DataError(f"{path}: a .json file holds a list of records, this holds a {type(records).__name__}.")
        partial = target.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.replace(target)
    return target
