"""How long every sample will be, known before the first step: from text and media headers, cached on disk.

Nothing is dropped here silently: what cannot be a sample, and what is cut off one, is counted. A cache holds as long as
records, encoder and every media file (its size and time of change) stay as they were.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Conversation, Image, Video
from qwenvl_ft.data.encode.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import file_of
from qwenvl_ft.data.plan.walk import walk
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

COLUMNS = {
    "tokens": np.int32,
    "patches": np.int32,
    "has_video": bool,
    "status": np.int8,
    "cut_tokens": np.int32,
    "cut_media": np.int32,
}
"""Fields of `Lengths` and how they are kept."""
CHUNK = 256
"""Records that a worker measures before it answers."""
PARALLEL_FROM = 2_000
"""Records from which starting workers pays."""
LAYOUT = 3
"""Raised whenever what a cache file holds changes its meaning."""

KEPT, TOO_LONG, UNSUPERVISED, BAD = range(4)
File = tuple[str, int, int]
"""Path of a media file, its size in bytes and its time of change in nanoseconds; -1, 0 if it is not there."""
Row = tuple[int, int, bool, int, int, int]
"""An entry of each array of `Lengths`."""
REASONS = {
    TOO_LONG: "longer than template.max_length",
    UNSUPERVISED: "no supervised token",
    BAD: "that cannot be read",
}
MAX_FAULTS = 5
"""Records that cannot be read of which a summary tells why."""


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
    cut_tokens: NDArray[np.int32]
    """[R] tokens that template.truncation_strategy took off."""
    cut_media: NDArray[np.int32]
    """[R] images and videos that went with them."""
    faults: tuple[str, ...] = ()
    """Why the first of the records that cannot be read cannot be."""

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the records that become samples."""
        return np.flatnonzero(self.status == KEPT)

    def dropped(self) -> dict[str, int]:
        """Reason -> number of records."""
        counts = Counter(self.status[self.status != KEPT].tolist())
        return {REASONS[status]: count for status, count in sorted(counts.items())}

    def cut(self) -> tuple[int, int, int]:
        """Samples that were cut to template.max_length, tokens and media they lost."""
        return int((self.cut_tokens > 0).sum()), int(self.cut_tokens.sum()), int(self.cut_media.sum())


class _MeasureRecord:
    """Measures one record: its `Row`, its media files, and why it cannot be read (else empty)."""

    def __init__(self, encoder: Encoder, on_error: str) -> None:
        self.encoder = encoder
        self.on_error = on_error

    def __call__(self, records: Any, index: int) -> tuple[Row, list[File], str]:
        files: list[File] = []
        conversation = None
        try:
            record = records[index]
            conversation = record if isinstance(record, Conversation) else read_record(*record)
            files = [_state(path) for path in conversation_files(conversation)]  # before they are opened
            return self._row(conversation), files, ""
        except DataError as error:
            if self.on_error == "raise" or isinstance(error, (TooLong, Unsupervised)):
                raise
            return (0, 0, False, BAD, 0, 0), files + _unreached(conversation), str(error)

    def _row(self, conversation: Conversation) -> Row:
        try:
            told = self.encoder.extent(conversation)
        except (TooLong, Unsupervised) as error:
            if self.encoder.truncation_strategy == "raise":
                raise
            return 0, 0, False, TOO_LONG if isinstance(error, TooLong) else UNSUPERVISED, 0, 0
        return told.tokens, told.patches, told.has_video, KEPT, told.cut_tokens, told.cut_media


def conversation_files(conversation: Conversation) -> list[str]:
    """Paths of the media files that a conversation shows."""
    values = [image.value for image in conversation.media(Image)]
    for video in conversation.media(Video):
        values += video.value if isinstance(video.value, (list, tuple)) else [video.value]
    return [path for path in map(file_of, values) if path is not None]


def _unreached(conversation: Conversation | None) -> list[File]:
    """URLs of a record that could not be measured, in a state that no path has: they are tried again the next time."""
    if conversation is None:
        return []
    values = [str(medium.value) for kind in (Image, Video) for medium in conversation.media(kind)]
    return [(value, 0, 0) for value in values if value.startswith(("http://", "https://"))]


def measure(
    records: Any,
    encoder: Encoder,
    *,
    num_proc: int = 1,
    cache_dir: str | Path | None = None,
    on_error: str = "raise",
) -> Lengths:
    """Lengths of all records; a second call with the same records, media and encoder reads them from disk.

    Of several processes that share ``cache_dir`` one measures, the others wait for its file.

    Args:
        records: a list of (record, `Source`, folder of relative media), or of `Conversation` s, with a ``fingerprint``.
        on_error: ``skip`` counts a record that cannot be read as `BAD` instead of raising.

    Raises:
        DataError: a record is malformed or a medium cannot be opened; it names the record.
    """
    folder = Path(cache_dir) if cache_dir is not None else _default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{LAYOUT}:{on_error}:{records.fingerprint}:{encoder.fingerprint()}".encode()).hexdigest()[:32]
    path = folder / f"lengths-{key}.npz"
    lengths = _cached(path)
    if lengths is None:
        with FileLock(f"{path}.lock"):
            lengths = _cached(path)
            if lengths is None:
                lengths, files = _measure(records, encoder, num_proc, on_error)
                _save(path, lengths, files)
    return lengths


def _measure(records: Any, encoder: Encoder, num_proc: int, on_error: str) -> tuple[Lengths, list[File]]:
    measured = walk(
        records,
        _MeasureRecord(encoder, on_error),
        num_proc=min(num_proc, len(os.sched_getaffinity(0))),
        label="measuring lengths",
        chunk=CHUNK,
        parallel_from=PARALLEL_FROM,
    )
    rows: list[Row] = []
    files: dict[str, File] = {}
    faults: list[str] = []
    for row, opened, fault in measured:
        rows.append(row)
        if fault and len(faults) < MAX_FAULTS:
            faults.append(fault)
        for file in opened:
            files.setdefault(file[0], file)
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    arrays = {name: column.astype(dtype) for (name, dtype), column in zip(COLUMNS.items(), columns, strict=True)}
    return Lengths(**arrays, faults=tuple(faults)), list(files.values())


def _save(path: Path, lengths: Lengths, files: list[File]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.npz")
    names = _as_bytes([file[0] for file in files])
    states = np.asarray([file[1:] for file in files], dtype=np.int64).reshape(-1, 2)
    arrays = {name: getattr(lengths, name) for name in COLUMNS}
    np.savez(partial, files=names, states=states, faults=_as_bytes(lengths.faults), **arrays)
    partial.replace(path)


def _cached(path: Path) -> Lengths | None:
    """What the cache holds, unless a media file changed since."""
    if not path.exists():
        return None
    with np.load(path) as told:
        states = told["states"].tolist()
        for name, (size, changed) in zip(_as_texts(told["files"]), states, strict=True):
            if _state(name) != (name, size, changed):
                return None
        return Lengths(**{name: told[name] for name in COLUMNS}, faults=tuple(_as_texts(told["faults"])))


def _as_bytes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts without a null as one array that is no pickle."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _as_texts(array: NDArray[np.uint8]) -> list[str]:
    joined = array.tobytes().decode("utf-8", "surrogateescape")
    return joined.split("\0") if joined else []


def _state(path: str) -> File:
    try:
        told = os.stat(path)  # noqa: PTH116 - a million of them: no Path for each
    except OSError:
        return path, -1, 0
    return path, told.st_size, told.st_mtime_ns


def _default_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qwenvl_ft"


def require_some(lengths: Lengths, name: str) -> None:
    """Raises DataError if nothing is left to train on, with the reasons."""
    if lengths.kept.size == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lengths.dropped().items()) or "it is empty"
        raise DataError(f"{name}: no record can be used ({reasons}).")
