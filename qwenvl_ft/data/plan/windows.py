"""A stream as a data set whose epochs are the windows of the stream: each is measured and planned when its turn comes.

Two windows are held at a time, the present one and the one before. While a window is trained, a process of its own
copies the shards of the next one and measures its records. A checkpoint holds where its window begins, so a resumed run
reads that window again and nothing before it.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from qwenvl_ft.data.conversation import Conversation
from qwenvl_ft.data.dense.groups import EpochConversations
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import Planned, SampleDataset, Totals
from qwenvl_ft.data.plan.epochs import Epochs, Raw
from qwenvl_ft.data.plan.lengths import BAD, COLUMNS, Lengths, measure, require_some
from qwenvl_ft.data.sources.records import Part, Records
from qwenvl_ft.data.sources.shards import Shard
from qwenvl_ft.data.sources.stream import Position, Stream
from qwenvl_ft.errors import DataError

ENDED = Planned(Lengths(**{name: np.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()}))  # type: ignore[arg-type]
"""The window after the last one."""

logger = logging.getLogger("qwenvl_ft.data")


class Begin(NamedTuple):
    """Where a window begins."""

    position: Position = Position()
    shards: tuple[Shard, ...] | None = None
    """All shards of the position's round; None if they are to be listed."""
    samples: int = 0
    """Samples before it, dropped ones included."""
    bad: int = 0
    """Those of them that could not be read."""


class Saved(NamedTuple):
    """Where a run is in its stream."""

    window: int = 0
    begin: Begin = Begin()
    before: Totals = Totals()
    """What was trained before the window."""

    def to_dict(self) -> dict[str, Any]:
        begin = self.begin._asdict() | {"position": self.begin.position._asdict()}
        return {"window": self.window, "begin": begin, "before": self.before._asdict()}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "Saved":
        begin = saved["begin"]
        shards = None if begin["shards"] is None else tuple(Shard(*shard) for shard in begin["shards"])
        position = Position(**begin["position"])
        return Saved(
            saved["window"], Begin(**begin | {"position": position, "shards": shards}), Totals(**saved["before"])
        )


@dataclass
class Window:
    """A window that was read."""

    begin: Begin
    end: Position
    epochs: Epochs
    """Its conversations."""
    addresses: list[str]
    identity: str
    """Hash of its records: the bytes of their shards, and which rows of them."""
    left_out: int = 0
    """Records that were left out for their label."""


@dataclass
class StreamOptions:
    """How a process takes part in a stream."""

    folder: Path
    """Copies of shards lie below it; all processes of a machine share it."""
    listed: Callable[[], Sequence[Shard]]
    """Return the shards of a round that begins; the same ones on every rank."""
    rounds: int | None = None
    """Rounds after which the stream ends; None for no end."""
    leads: bool = True
    """True for the one process of a machine that reads ahead, and removes what is no longer needed."""
    reads_ahead: bool = True
    saved: Saved = field(default_factory=Saved)
    """Where a resumed run goes on."""


class Windows:
    """The windows of a stream, with the interface of `Epochs` for those that are held.

    Args:
        conversations: records of a window -> its conversations.
    """

    def __init__(self, stream: Stream, conversations: Callable[[Records], Epochs], options: StreamOptions) -> None:
        self.stream = stream
        self.options = options
        self.last = options.saved.window
        """The window that was read last."""
        self.held: dict[int, Window] = {}
        self._conversations: Callable[[Records], Epochs] | None = conversations

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"options": None, "_conversations": None}  # a worker reads no window

    def __len__(self) -> int:
        return len(self.held[self.last].epochs)

    def conversation(self, epoch: int, place: int) -> Conversation:
        return self.held[epoch].epochs.conversation(epoch, place)

    def raw(self, epoch: int, place: int) -> list[Raw]:
        return self.held[epoch].epochs.raw(epoch, place)

    def measured_as(self, epoch: int) -> int:
        return epoch

    def fingerprint(self, epoch: int) -> str:
        return self.held[epoch].epochs.fingerprint(epoch)

    def folder(self, number: int) -> Path:
        """Return the folder of a window's lengths."""
        return self.stream.folder / "windows" / str(number)

    def read(self, begin: Begin) -> Window | None:
        """Read the window at a position, or the first one after it; None at the end of the stream.

        Raises:
            DataError: a shard cannot be read, or a whole round has no record.
        """
        assert self._conversations is not None
        while self.options.rounds is None or begin.position.round < self.options.rounds:
            shards = tuple(self.options.listed()) if begin.shards is None else begin.shards
            begin = begin._replace(shards=shards)
            parts, end = self.stream.read(begin.position, shards)
            if parts:
                records = Records(parts)
                addresses = [part.address for part in parts]
                left_out = sum(part.left_out for part in parts)
                return Window(begin, end, self._conversations(records), addresses, _identity(parts), left_out)
            if begin.position == Position(begin.position.round):
                raise DataError(f"none of the {len(shards)} shards has a record.")
            begin = begin._replace(position=end, shards=None)
        return None

    def hold(self, number: int, window: Window) -> None:
        """Keep a window, and the one before it, and close all others."""
        self.held = {other: kept for other, kept in self.held.items() if other == number - 1} | {number: window}
        self.last = number
        kept = [address for window in self.held.values() for address in window.addresses]
        self.stream.keep(kept, evict=self.options.leads)
        for folder in (self.stream.folder / "windows").glob("*") if self.options.leads else ():
            if folder.name not in map(str, self.held):
                shutil.rmtree(folder, ignore_errors=True)


def _identity(parts: Sequence[Part]) -> str:
    """Return a hash of the rows of shards, whatever their addresses are."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.digest.encode())
        digest.update(np.asarray(part.rows, dtype=np.int64).tobytes())
    return digest.hexdigest()


class WindowDataset(SampleDataset):
    """The samples of a stream; epoch ``k`` is its ``k``-th window, counted over all rounds.

    Windows are read in order, by all ranks together.

    Args:
        windows: their first one is read now.
        options: as for `SampleDataset`. ``max_bad_fraction`` is a share of all samples so far, at least of a window.

    Raises:
        DataError: as `SampleDataset`, of each window when its turn comes.
    """

    def __init__(self, windows: Windows, encoder: Encoder, **options: Any) -> None:
        saved = windows.options.saved
        self.windows, self.first, self.before = windows, saved.window, saved.before
        self._start = saved.begin
        self._ahead: Any = None
        super().__init__(windows, encoder, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"planned_epochs": {}, "_ahead": None}

    def at(self, epoch: int) -> Planned:
        """Return the sizes of a window's samples; `ENDED` after the last window.

        Raises:
            DataError: a shard or too many records cannot be read, or two whole rounds hold nothing to train on.
        """
        if epoch not in self.planned_epochs:
            window, planned = self._load(epoch)
            if window is None:
                return planned
            for old in [other for other in self.planned_epochs if other != epoch - 1]:
                del self.planned_epochs[old]
            self.planned_epochs[epoch] = planned
            self.windows.hold(epoch, window)
            self._read_ahead(epoch + 1)
        return self.planned_epochs[epoch]

    def has_begun(self, epoch: int) -> bool:
        return epoch <= self.windows.last

    @property
    def present(self) -> int:
        return self.windows.last

    def identity(self, epoch: int) -> str:
        return self.windows.held[epoch].identity

    def count_for_limit(self, epoch: int) -> int:
        return max(len(self.at(epoch)), self.windows.stream.window)

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """Images and videos: a later window may have either."""
        return ("image", "video")

    def saved(self, before: Totals) -> Saved:
        """Return where the present window begins.

        Args:
            before: what was trained before it.
        """
        return Saved(self.windows.last, self.windows.held[self.windows.last].begin, before)

    def close(self) -> None:
        """Remove the copies of shards, at the end of a run."""
        if self._ahead is not None:
            self._ahead.kill()
            self._ahead.join()
        if self.windows.options.leads:
            shutil.rmtree(self.windows.stream.folder, ignore_errors=True)
            with suppress(OSError):  # the folder of the run, which other machines may share
                self.windows.stream.folder.parent.rmdir()

    def summary(self) -> str:
        """Summarise the present window in one line, as `SampleDataset` does an epoch."""
        number = self.windows.last
        window = self.windows.held[number]
        self.left_out = window.left_out
        place = f"window {number + 1} of up to {self.windows.stream.window:,} records"
        shards = len(window.begin.shards or ())
        where = f"round {window.begin.position.round + 1}, shard {window.begin.position.shard + 1} of {shards:,}"
        return self.summarised(f"{self.name}: {place} ({where})", self.at(number))

    def _begin_of(self, epoch: int) -> Begin:
        if epoch in self.windows.held:
            return self.windows.held[epoch].begin
        if epoch == self.first:
            return self._start
        earlier = self.windows.held[epoch - 1]
        return self._after(earlier, self.at(epoch - 1).measured)

    def _after(self, window: Window, measured: Lengths) -> Begin:
        """Return where the next window begins."""
        begin = window.begin
        samples, bad = begin.samples + len(measured.status), begin.bad + int((measured.status == BAD).sum())
        same_round = window.end.round == begin.position.round
        return Begin(window.end, begin.shards if same_round else None, samples, bad)

    def _load(self, epoch: int) -> tuple[Window | None, Planned]:
        """Read and measure a window; those without a single sample are passed over."""
        begin = self._begin_of(epoch)
        last_round = begin.position.round + 1
        while (window := self.windows.read(begin)) is not None:
            measured = measure(
                EpochConversations(window.epochs, epoch),
                self.encoder,
                num_proc=self.num_proc,
                cache_dir=self.windows.folder(epoch),
                on_error=self.on_error,
            )
            begin = self._after(window, measured)
            self._check_share(begin, measured)
            if measured.kept.size:
                return window, Planned(measured)
            if begin.position.round > last_round:
                require_some(measured, self.name)
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in measured.dropped().items())
            logger.warning("%s: a window without a sample is passed over: %s", self.name, reasons)
        return None, ENDED

    def _check_share(self, after: Begin, measured: Lengths) -> None:
        most = self.max_bad_fraction * max(after.samples, self.windows.stream.window)
        if after.bad > most:
            first = measured.faults[0] if measured.faults else ""
            raise DataError(
                f"{self.name}: {after.bad:,} of the {after.samples:,} samples so far cannot be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}; the last: {first}"
            )

    # -- reading ahead ---------------------------------------------------------------------------------------------

    def _read_ahead(self, epoch: int) -> None:
        """Copy and measure the next window in a process of its own; not across rounds, whose shards are listed then."""
        options, window = self.windows.options, self.windows.held[epoch - 1]
        if not (options.leads and options.reads_ahead) or window.end.round != window.begin.position.round:
            return
        self._ahead = multiprocessing.get_context("fork").Process(target=self._fill_cache, args=(epoch,), daemon=True)
        self._ahead.start()

    def _fill_cache(self, epoch: int) -> None:
        """Leave a window's shards and lengths on the disk; an error is left to the process that needs them."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's to handle
        torch.set_num_threads(1)
        with suppress(Exception), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            sys.stderr = nowhere
            self.num_proc = 1
            self.windows.options.rounds = self._begin_of(epoch).position.round + 1
            self._load(epoch)
