"""Joins records, encoder and lengths into a dataset of samples, with the sizes that each epoch's plan needs.

Letters in shapes: S samples of an epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import Dataset

from qwenvl_ft.data.conversation import IGNORE, Conversation, Sample, Source
from qwenvl_ft.data.dense.groups import EpochConversations
from qwenvl_ft.data.encode.draft import Draft
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.frames import first_frame_line
from qwenvl_ft.data.plan.epochs import Epochs, RecordEpochs
from qwenvl_ft.data.plan.lengths import BAD, Lengths, measure, require_some
from qwenvl_ft.data.plan.shared_row import shared_row
from qwenvl_ft.data.share import Share, padding
from qwenvl_ft.data.unread import tally_lines
from qwenvl_ft.errors import DataError


class Ticket(NamedTuple):
    """Identifies a sample of an epoch; holds all that a dataloader worker needs to know of the plan."""

    epoch: int
    place: int
    """Index into the epoch's conversations, dropped ones included."""
    tokens: int
    """Planned length."""
    filler: bool = False
    """True removes the labels, see `assign`."""


class PlanKey(NamedTuple):
    """Two epochs with equal keys have the same plan, given the same seed and `RunShape`."""

    samples: int
    lengths: str
    """Hash of the samples' tokens; stored in checkpoints."""
    columns: str
    """Hash of everything that a plan depends on: which records are kept, their tokens, patches and videos."""


class Totals(NamedTuple):
    """What a run has trained up to some point, over all ranks."""

    steps: int = 0
    passes: int = 0
    """Micro-batches of one rank."""
    tokens: int = 0
    samples: int = 0

    def plus(self, more: "Totals") -> "Totals":
        return Totals(*(own + other for own, other in zip(self, more, strict=True)))


@dataclass(frozen=True)
class Planned:
    """Sizes of an epoch's samples, from which the plan is computed."""

    measured: Lengths

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """int64[S], indices of the usable conversations."""
        return self.measured.kept

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """int64[S], tokens of each sample."""
        return self.measured.tokens[self.index].astype(np.int64)

    @cached_property
    def patches(self) -> NDArray[np.int64]:
        """int64[S], vision patches of each sample."""
        return self.measured.patches[self.index].astype(np.int64)

    def key(self) -> PlanKey:
        """Identify the plan, to compare ranks and to compare a checkpoint with the run that resumes it."""
        columns = (self.index, self.tokens, self.patches, self.measured.has_video[self.index])
        joined = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
        lengths = xxhash.xxh64(self.tokens.tobytes()).hexdigest()
        return PlanKey(len(self), lengths, xxhash.xxh128(joined).hexdigest())

    def __len__(self) -> int:
        return len(self.index)


class SampleDataset(Dataset[Sample]):
    """The samples of a data set. Records that cannot become a sample (too long, unsupervised) are counted and dropped.

    ``dataset[i]`` encodes the i-th usable conversation of the `present` epoch, ``dataset[dataset.ticket(epoch, i)]``
    that of any epoch. ``dataset[~i]`` is the same sample without labels, a filler (see `assign`).

    Args:
        records: `Epochs`, or records that each become one conversation.
        name: of the data set, for messages.
        num_proc: maximum number of worker processes that measure lengths.
        cache_dir: folder of the cached lengths, see `measure`.
        on_error: what to do with records that cannot be read: ``raise`` or ``skip``. A record that fails while lengths
            are measured is dropped. One that fails later, when the plan is fixed, is replaced by a placeholder: a
            sample of one unsupervised token, with the reason as its ``fault``.
        max_bad_fraction: with ``skip``, the largest share of an epoch's records that may be dropped as unreadable.
        left_out: number of records that were left out for their label (``data.label``), for the summary.

    Raises:
        DataError: no record is usable, a record is malformed, or too many are.
    """

    first = 0
    """The first epoch of this process; others than 0 only in a stream (`plan.windows`)."""
    before = Totals()
    """What the run had trained before its first epoch."""

    def __init__(
        self,
        records: Any,
        encoder: Encoder,
        *,
        name: str = "data",
        num_proc: int = 1,
        cache_dir: str | Path | None = None,
        on_error: str = "raise",
        max_bad_fraction: float = 0.01,
        left_out: int = 0,
    ) -> None:
        self.epochs: Epochs = records if hasattr(records, "measured_as") else RecordEpochs(records)
        self.encoder = encoder
        self.name = name
        self.num_proc = num_proc
        self.cache_dir = cache_dir
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        self.left_out = left_out
        self.share: Share | None = None
        self.planned_epochs: dict[int, Planned] = {}
        self.at(self.present)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"planned_epochs": {}}  # workers need no plan: a `Ticket` tells them enough

    def measured_as(self, epoch: int) -> int:
        """Return the first epoch whose samples have the same lengths as those of ``epoch``."""
        return self.epochs.measured_as(epoch)

    def has_begun(self, epoch: int) -> bool:
        """Return True if an epoch can be planned now; False for a window of a stream that is not read yet."""
        return True

    @property
    def present(self) -> int:
        """The epoch that messages are about, and that identifies the plan in a checkpoint: the first one; of a stream
        the window that was read last."""
        return self.first

    def close(self) -> None:
        """Remove what only this run needs of its data: nothing but the copies of a stream's shards."""

    def identity(self, epoch: int) -> str:
        """Return a hash of an epoch's records, if they are known by more than the plan; else an empty text."""
        return ""

    def count_for_limit(self, epoch: int) -> int:
        """Return the number of samples of which ``max_bad_fraction`` may be replaced in an epoch."""
        return len(self.at(epoch))

    def at(self, epoch: int) -> Planned:
        """Return the sizes of an epoch's samples; measured on first use.

        Raises:
            DataError: as for the constructor.
        """
        same = self.measured_as(epoch)
        if same not in self.planned_epochs:
            measured = measure(
                EpochConversations(self.epochs, same),
                self.encoder,
                num_proc=self.num_proc,
                cache_dir=self.cache_dir,
                on_error=self.on_error,
            )
            self._check_bad(measured)
            require_some(measured, self.name)
            self.planned_epochs[same] = Planned(measured)
        return self.planned_epochs[same]

    def conversation(self, index: int | Ticket) -> Conversation:
        """Return the conversation that a sample is made from.

        Raises:
            DataError: a record is malformed.
        """
        ticket = index if isinstance(index, Ticket) else self.ticket(self.present, index)
        return self.epochs.conversation(ticket.epoch, ticket.place)

    def ticket(self, epoch: int, index: int) -> Ticket:
        """Return the ticket of the ``index``-th usable sample of an epoch; ``~index`` is its filler."""
        planned, place = self.at(epoch), index if index >= 0 else ~index
        return Ticket(epoch, int(planned.index[place]), int(planned.tokens[place]), index < 0)

    def __len__(self) -> int:
        """Return the number of samples of the present epoch."""
        return len(self.at(self.present))

    def __getitem__(self, index: int | Ticket) -> Sample:
        ticket = index if isinstance(index, Ticket) else self.ticket(self.present, index)
        try:
            return self._sample(ticket)
        except DataError as error:
            if self.on_error == "raise":
                raise
            return self.placeholder(str(error))

    def _sample(self, ticket: Ticket) -> Sample:
        return self.sample_of(ticket, self.draft(ticket))

    def __getitems__(self, indices: Sequence[int | Ticket]) -> list[Sample]:
        """Return the samples of a batch; in a `shared` data set, this rank's share of them."""
        if self.share is None:
            return [self[index] for index in indices]
        return self.row([index if isinstance(index, Ticket) else self.ticket(self.present, index) for index in indices])

    def shared(self, share: Share) -> "SampleDataset":
        """Return the same data set for a rank that trains its rows together with others."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, share=share)  # the plans too, which a copy for a worker lacks
        return other

    def row(self, tickets: Sequence[Ticket], left_out: Mapping[int, str] | None = None) -> list[Sample]:
        """Return this rank's share of a row, see `shared_row`; the data set must be `shared`."""
        assert self.share is not None
        return shared_row(self, tickets, self.share, left_out)

    def draft(self, ticket: Ticket) -> Draft:
        """Return the draft of a sample.

        Raises:
            DataError: a record is malformed, or its length is not the planned one.
        """
        conversation = self.conversation(ticket)
        draft = self.encoder.draft_in_time(conversation)
        if draft.length != ticket.tokens:
            raise DataError(
                f"{conversation.source}: planned with {ticket.tokens} tokens, encoded to {draft.length}. "
                "Was a media file changed after planning? Put the original back, or start a new run."
            )
        return draft

    def sample_of(
        self, ticket: Ticket, draft: Draft, owned: NDArray[np.bool_] | None = None, *, blank: bool = False
    ) -> Sample:
        """Return the sample of a ticket's draft; for ``owned`` and ``blank`` see `Encoder.sample`.

        Raises:
            DataError: a medium cannot be decoded.
        """
        sample = self.encoder.sample(draft, owned, blank=blank)
        if ticket.filler:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        return sample

    def placeholder(self, fault: str, tokens: int = 1) -> Sample:
        """Return a sample of unsupervised padding tokens."""
        sample = padding(tokens, self.encoder.processor.tokenizer.pad_token_id)
        sample["source"], sample["fault"] = Source(self.name, fault.split(": ")[0]), fault
        return sample

    def _check_bad(self, measured: Lengths) -> None:
        bad = int((measured.status == BAD).sum())
        if bad > self.max_bad_fraction * len(measured.status):
            raise DataError(
                f"{self.name}: {bad} of {len(measured.status)} samples cannot be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}; the first: {measured.faults[0]}"
            )

    @property
    def index(self) -> NDArray[np.int64]:
        """int64[S], indices of the usable conversations of the present epoch."""
        return self.at(self.present).index

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[S], tokens of each sample of the present epoch."""
        return self.at(self.present).tokens

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """Kinds of media that every rank must run in every pass: ``image``, and ``video`` if a sample has one."""
        return ("image", "video") if self.at(self.present).measured.has_video.any() else ("image",)

    def summary(self) -> str:
        """Summarise the present epoch in one line: samples, tokens, dropped records by reason, truncation."""
        return self.summarised(self.name, self.at(self.present))

    def summarised(self, name: str, planned: Planned) -> str:
        tokens, measured = planned.tokens, planned.measured
        reasons = measured.dropped() | ({"with label false": self.left_out} if self.left_out else {})
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        line = f"{name}: {len(planned):,} samples, {int(tokens.sum()):,} tokens, mean {tokens.mean():.0f}"
        line = f"{line}, longest {tokens.max():,}" + (f"; left out: {dropped}" if dropped else "")
        line += f" (the first: {measured.faults[0]})" if measured.faults else ""
        samples, lost, media = measured.cut()
        cut = f"; cut: {samples:,} samples, by {lost:,} tokens" + (f" and {media:,} media" if media else "")
        return line + (cut if samples else "")

    def remarks(self) -> list[str]:
        """Return a line for each key of the present epoch's records that nothing reads, and for each data set with
        images of which the first of several frames is shown."""
        measured = self.at(self.present).measured
        frames = [first_frame_line(name, *counted) for name, counted in measured.several_frames.items()]
        return [f"{self.name}: {line}" for line in tally_lines(measured.unread) + frames]
