"""Measures the length of every sample before training, from text and media headers, and caches the result on disk.

Nothing is dropped silently: records that cannot become samples are counted by reason, as is what truncation removes.
A cache file is valid as long as the records, the encoder and every media file (size and modification time) are
unchanged. Letters in shapes: R records.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Conversation, Image, Video
from qwenvl_ft.data.encode.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import file_of
from qwenvl_ft.data.plan.walk import walk
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.unread import Tally, Unread, tally
from qwenvl_ft.errors import DataError

COLUMNS = {
    "tokens": np.int32,
    "patches": np.int32,
    "has_video": bool,
    "status": np.int8,
    "cut_tokens": np.int32,
    "cut_media": np.int32,
}
"""Arrays of `Lengths` and their dtypes."""
TALLIES = ("unread", "several_frames")
"""Counts of `Lengths`."""
CHUNK = 256
"""Records that a worker measures before it returns their lengths."""
PARALLEL_FROM = 2_000
"""Number of records from which starting workers pays off."""
LAYOUT = 5
"""Version of the cache file's layout; increase it whenever the meaning of the contents changes."""

KEPT, TOO_LONG, UNSUPERVISED, BAD = range(4)
"""Status of a record: `KEPT`, or why it does not become a sample."""
File = tuple[str, int, int]
"""Path of a media file, its size in bytes and its modification time in nanoseconds; -1 and 0 if it is missing."""
Row = tuple[int, int, bool, int, int, int]
"""One record's entries in the arrays of `Lengths`, in the order of `COLUMNS`."""


class _Unread(NamedTuple):
    """What nothing reads of a record or group."""

    keys: tuple[Unread, ...]
    where: str


class _Frames(NamedTuple):
    """Images of several frames of a record or group, as in `Extent`."""

    dataset: str
    images: tuple[str, ...]


NOTHING_UNREAD, NO_FRAMES = _Unread((), ""), _Frames("", ())
Measurement = tuple[Row, list[File], _Unread, _Frames, str]
REASONS = {
    TOO_LONG: "longer than template.max_length",
    UNSUPERVISED: "no supervised token",
    BAD: "that cannot be read",
}
"""Status -> how a summary names it."""
MAX_FAULTS = 5
"""Number of unreadable records whose error is kept."""


@dataclass(frozen=True)
class Lengths:
    """Length and status of each record, for planning."""

    tokens: NDArray[np.int32]
    """[R] tokens of the sample; 0 if there is none."""
    patches: NDArray[np.int32]
    """[R] vision patches."""
    has_video: NDArray[np.bool_]
    """[R] True if the sample shows a video."""
    status: NDArray[np.int8]
    """[R] `KEPT`, `TOO_LONG`, `UNSUPERVISED` or `BAD`."""
    cut_tokens: NDArray[np.int32]
    """[R] tokens that truncation removed."""
    cut_media: NDArray[np.int32]
    """[R] images and videos that truncation removed."""
    faults: tuple[str, ...] = ()
    """Errors of the first `MAX_FAULTS` unreadable records."""
    unread: Mapping[str, Tally] = field(default_factory=dict)
    """Keys that hold something and are read by nothing."""
    several_frames: Mapping[str, Tally] = field(default_factory=dict)
    """Data set -> images of several frames or pages, of which the first is shown because none was chosen."""

    @property
    def kept(self) -> NDArray[np.int64]:
        """int64[S], indices of the records that become samples."""
        return np.flatnonzero(self.status == KEPT)

    def dropped(self) -> dict[str, int]:
        """Count the dropped records by reason."""
        counts = Counter(self.status[self.status != KEPT].tolist())
        return {REASONS[status]: count for status, count in sorted(counts.items())}

    def cut(self) -> tuple[int, int, int]:
        """Return the number of truncated samples, and of the tokens and media that they lost."""
        return int((self.cut_tokens > 0).sum()), int(self.cut_tokens.sum()), int(self.cut_media.sum())


class _MeasureRecord:
    """Measures one record: its `Row`, its media files, what nothing reads, unchosen frames, why it cannot be read."""

    def __init__(self, encoder: Encoder, on_error: str) -> None:
        self.encoder = encoder
        self.on_error = on_error

    def __call__(self, records: Any, index: int) -> Measurement:
        files: list[File] = []
        conversation = None
        try:
            record = records[index]
            conversation = record if isinstance(record, Conversation) else read_record(*record)
            files = [_state(path) for path in conversation_files(conversation)]  # before they are opened
            unread = _Unread(conversation.unread, str(conversation.source))
            row, images = self._row(conversation)
            return row, files, unread, _Frames(conversation.source.dataset, images), ""
        except DataError as error:
            if self.on_error == "raise" or isinstance(error, (TooLong, Unsupervised)):
                raise
            return (0, 0, False, BAD, 0, 0), files + _unreached(conversation), NOTHING_UNREAD, NO_FRAMES, str(error)

    def _row(self, conversation: Conversation) -> tuple[Row, tuple[str, ...]]:
        try:
            extent = self.encoder.extent(conversation)
        except (TooLong, Unsupervised) as error:
            if self.encoder.truncation_strategy == "raise":
                raise
            return (0, 0, False, TOO_LONG if isinstance(error, TooLong) else UNSUPERVISED, 0, 0), ()
        size = extent.tokens, extent.patches, extent.has_video, KEPT, extent.cut_tokens, extent.cut_media
        return size, extent.several_frames


def conversation_files(conversation: Conversation) -> list[str]:
    """Return the paths of a conversation's media files."""
    values = [image.value for image in conversation.media(Image)]
    for video in conversation.media(Video):
        values += video.value if isinstance(video.value, (list, tuple)) else [video.value]
    return [path for path in map(file_of, values) if path is not None]


def _unreached(conversation: Conversation | None) -> list[File]:
    """Return the URLs of an unreadable record with a state that no file can have, so that the next run retries them."""
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
    """Return the lengths of all records. A second call with the same records, media and encoder reads the cache.

    If several processes share ``cache_dir``, one measures and the others wait for its file.

    Args:
        records: a list of (record, `Source`, folder of relative media), or of `Conversation` s, with a ``fingerprint``.
        num_proc: maximum number of worker processes; limited to the CPUs of this process.
        cache_dir: None is a folder beside the caches of datasets.
        on_error: ``skip`` counts an unreadable record as `BAD` instead of raising.

    Raises:
        DataError: names a record that is malformed or has a medium that cannot be opened.
        TooLong, Unsupervised: names the record, if the encoder's ``truncation_strategy`` is ``raise``.
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
    workers = min(num_proc, len(os.sched_getaffinity(0))) if len(records) >= PARALLEL_FROM else 1
    measured = walk(
        records,
        _MeasureRecord(encoder, on_error),
        num_proc=workers,
        label="measuring lengths",
        chunk=CHUNK,
        parallel_from=PARALLEL_FROM,
    )
    rows: list[Row] = []
    files: dict[str, File] = {}
    faults: list[str] = []
    counted: dict[str, Tally] = {}
    several: dict[str, Tally] = {}
    for row, opened, unread, frames, fault in measured:
        rows.append(row)
        if fault and len(faults) < MAX_FAULTS:
            faults.append(fault)
        tally(counted, *unread)
        for image in frames.images:
            count, example = several.get(frames.dataset, Tally(0, image))
            several[frames.dataset] = Tally(count + 1, example)
        for file in opened:
            files.setdefault(file[0], file)
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, len(COLUMNS)).T
    arrays = {name: column.astype(dtype) for (name, dtype), column in zip(COLUMNS.items(), columns, strict=True)}
    return Lengths(**arrays, faults=tuple(faults), unread=counted, several_frames=several), list(files.values())


def _save(path: Path, lengths: Lengths, files: list[File]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.npz")
    names = _as_bytes([file[0] for file in files])
    states = np.asarray([file[1:] for file in files], dtype=np.int64).reshape(-1, 2)
    arrays = {name: getattr(lengths, name) for name in COLUMNS}
    arrays |= {"faults": _as_bytes(lengths.faults), **{name: _tallies_as_bytes(lengths, name) for name in TALLIES}}
    np.savez(partial, files=names, states=states, **arrays)
    partial.replace(path)


def _cached(path: Path) -> Lengths | None:
    """Load a cache file; None if there is none or a media file has changed since."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        states = arrays["states"].tolist()
        for name, (size, changed) in zip(_as_texts(arrays["files"]), states, strict=True):
            if _state(name) != (name, size, changed):
                return None
        tallies: dict[str, Any] = {name: _as_tallies(arrays[name]) for name in TALLIES}
        columns = {name: arrays[name] for name in COLUMNS}
        return Lengths(**columns, faults=tuple(_as_texts(arrays["faults"])), **tallies)


def _tallies_as_bytes(lengths: Lengths, name: str) -> NDArray[np.uint8]:
    counted: Mapping[str, Tally] = getattr(lengths, name)
    return _as_bytes([text for key, (count, example) in counted.items() for text in (key, str(count), example)])


def _as_tallies(array: NDArray[np.uint8]) -> dict[str, Tally]:
    texts = iter(_as_texts(array))
    return {key: Tally(int(count), example) for key, count, example in zip(texts, texts, texts, strict=True)}


def _as_bytes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Store texts without null characters as one array that needs no pickle."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _as_texts(array: NDArray[np.uint8]) -> list[str]:
    joined = array.tobytes().decode("utf-8", "surrogateescape")
    return joined.split("\0") if joined else []


def _state(path: str) -> File:
    try:
        stat = os.stat(path)  # noqa: PTH116 - a million files: creating a Path for each is slow
    except OSError:
        return path, -1, 0
    return path, stat.st_size, stat.st_mtime_ns


def _default_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qwenvl_ft"


def require_some(lengths: Lengths, name: str) -> None:
    """Raise DataError if no record becomes a sample; the error counts the reasons."""
    if lengths.kept.size == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lengths.dropped().items()) or "it is empty"
        first = f" The first that cannot be read: {lengths.faults[0]}" if lengths.faults else ""
        raise DataError(f"{name}: no record can be used ({reasons}).{first}")
