"""How long every sample will be, known before the first step: from text and media headers, cached on disk.

Nothing is dropped here silently: what cannot be a sample is counted by reason, with its first cases.
"""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from qwenvl_ft.data.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

CHUNK = 256
"""Records that a worker measures before it answers."""
PARALLEL_FROM = 2_000
"""Records from which starting workers pays."""
LAYOUT = 1
"""Raised whenever what a cache file holds changes its meaning."""

KEPT, TOO_LONG, UNSUPERVISED = range(3)
REASONS = {TOO_LONG: "longer than template.max_length", UNSUPERVISED: "no supervised token"}


@dataclass(frozen=True)
class Lengths:
    """What planning knows of each record."""

    tokens: NDArray[np.int32]
    """[R] tokens of the sample; of a dropped one, what it would have had (0 where unknown)."""
    patches: NDArray[np.int32]
    """[R] vision patches."""
    has_video: NDArray[np.bool_]
    """[R]"""
    status: NDArray[np.int8]
    """[R] `KEPT` or why it is not."""

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the records that become samples."""
        return np.flatnonzero(self.status == KEPT)

    def dropped(self) -> dict[str, int]:
        """Reason -> number of records."""
        counts = Counter(self.status[self.status != KEPT].tolist())
        return {REASONS[status]: count for status, count in sorted(counts.items())}


class _Measured(Dataset[tuple[int, int, bool, int]]):
    """The length of each record, as a data set so that a `DataLoader` spreads the work."""

    def __init__(self, records: Any, encoder: Encoder) -> None:
        self.records = records
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int, bool, int]:
        record, source, media_root = self.records[index]
        try:
            draft = self.encoder.draft(read_record(record, source, media_root))
        except TooLong:
            if self.encoder.truncation_strategy == "raise":
                raise
            return 0, 0, False, TOO_LONG
        except Unsupervised:
            if self.encoder.truncation_strategy == "raise":
                raise
            return 0, 0, False, UNSUPERVISED
        return draft.length, draft.patches, bool(draft.videos), KEPT


def measure(records: Any, encoder: Encoder, *, num_proc: int = 1, cache_dir: str | Path | None = None) -> Lengths:
    """Lengths of all records; a second call with the same records and encoder reads them from disk.

    Of several processes that share ``cache_dir`` one measures, the others wait for its file.

    Raises:
        DataError: a record is malformed or a medium cannot be opened; it names the record.
    """
    folder = Path(cache_dir) if cache_dir is not None else _default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{LAYOUT}:{records.fingerprint}:{encoder.fingerprint()}".encode()).hexdigest()[:32]
    path = folder / f"lengths-{key}.npz"
    with FileLock(f"{path}.lock"):
        if path.exists():
            with np.load(path) as file:
                return Lengths(**{name: file[name] for name in Lengths.__dataclass_fields__})
        lengths = _measure(records, encoder, num_proc)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **{name: getattr(lengths, name) for name in Lengths.__dataclass_fields__})
        partial.replace(path)
    return lengths


def _measure(records: Any, encoder: Encoder, num_proc: int) -> Lengths:
    measured = _Measured(records, encoder)
    workers = num_proc if num_proc > 1 and len(measured) >= PARALLEL_FROM else 0
    if workers:
        loader: Any = DataLoader(measured, batch_size=CHUNK, num_workers=workers, collate_fn=list)
        rows = [row for chunk in loader for row in chunk]
    else:
        rows = [measured[index] for index in range(len(measured))]
    tokens, patches, video, status = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Lengths(
        np.asarray(tokens, dtype=np.int32),
        np.asarray(patches, dtype=np.int32),
        np.asarray(video, dtype=bool),
        np.asarray(status, dtype=np.int8),
    )


def _default_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qwenvl_ft"


def require_some(lengths: Lengths, name: str) -> None:
    """Raises DataError if nothing is left to train on, with the reasons."""
    if lengths.kept.size == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lengths.dropped().items()) or "it is empty"
        raise DataError(f"{name}: no record can be used ({reasons}).")
