"""Joins records, encoder and lengths: a dataset of samples, a sampler of each rank's batches, and their loader.

Letters in shapes: S samples of an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from qwenvl_ft.data.conversation import IGNORE, Conversation, Sample, Source
from qwenvl_ft.data.dense.groups import EpochConversations
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.epochs import Epochs, RecordEpochs
from qwenvl_ft.data.plan.lengths import BAD, Lengths, measure, require_some
from qwenvl_ft.data.plan.packing import Batch, RunShape, assign, fill, group_rows, pack_lengths, single_rows
from qwenvl_ft.errors import DataError

DEFAULT_COSTS = CostModel()


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


@dataclass(frozen=True)
class Planned:
    """Sizes of an epoch's samples, which the plan is made from."""

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

    ``dataset[i]`` encodes the i-th usable conversation of epoch 0, ``dataset[dataset.ticket(epoch, i)]`` that of any
    epoch. ``dataset[~i]`` is the same sample without labels, a filler (see `assign`).

    Args:
        records: `Epochs`, or records that each become one conversation.
        name: of the data set, for messages.
        num_proc: most worker processes that measure lengths.
        cache_dir: folder of the cached lengths, see `measure`.
        on_error: for records that cannot be read, ``raise`` or ``skip``. A record that fails while lengths are measured
            is dropped. One that fails later, when the plan is fixed, is replaced by a placeholder: a sample of one
            unsupervised token, with the reason as its ``fault``.
        max_bad_fraction: with ``skip``, the largest share of an epoch's records that may be dropped as unreadable.

    Raises:
        DataError: no record is usable, a record is malformed, or too many are.
    """

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
    ) -> None:
        self.epochs: Epochs = records if hasattr(records, "measured_as") else RecordEpochs(records)
        self.encoder = encoder
        self.name = name
        self.num_proc = num_proc
        self.cache_dir = cache_dir
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        self._planned: dict[int, Planned] = {}
        self.at(0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": {}}  # workers need no plan: a `Ticket` tells them enough

    def measured_as(self, epoch: int) -> int:
        """Return the first epoch whose samples have the same lengths as those of ``epoch``."""
        return self.epochs.measured_as(epoch)

    def at(self, epoch: int) -> Planned:
        """Return the sizes of an epoch's samples; measured on first use.

        Raises:
            DataError: as for the constructor.
        """
        same = self.measured_as(epoch)
        if same not in self._planned:
            measured = measure(
                EpochConversations(self.epochs, same),
                self.encoder,
                num_proc=self.num_proc,
                cache_dir=self.cache_dir,
                on_error=self.on_error,
            )
            self._check_bad(measured)
            require_some(measured, self.name)
            self._planned[same] = Planned(measured)
        return self._planned[same]

    def conversation(self, index: int | Ticket) -> Conversation:
        """Return the conversation that a sample is made from.

        Raises:
            DataError: a record is malformed.
        """
        ticket = index if isinstance(index, Ticket) else self.ticket(0, index)
        return self.epochs.conversation(ticket.epoch, ticket.place)

    def ticket(self, epoch: int, index: int) -> Ticket:
        """Return the ticket of the ``index``-th usable sample of an epoch; ``~index`` is its filler."""
        planned, place = self.at(epoch), index if index >= 0 else ~index
        return Ticket(epoch, int(planned.index[place]), int(planned.tokens[place]), index < 0)

    def __len__(self) -> int:
        """Return the number of samples of epoch 0."""
        return len(self.at(0))

    def __getitem__(self, index: int | Ticket) -> Sample:
        ticket = index if isinstance(index, Ticket) else self.ticket(0, index)
        try:
            return self._sample(ticket)
        except DataError as error:
            if self.on_error == "raise":
                raise
            return self._placeholder(str(error))

    def _sample(self, ticket: Ticket) -> Sample:
        conversation = self.conversation(ticket)
        sample = self.encoder(conversation)
        if len(sample["input_ids"]) != ticket.tokens:
            raise DataError(
                f"{conversation.source}: planned with {ticket.tokens} tokens, encoded to {len(sample['input_ids'])}. "
                "Was a media file changed after planning? Start again; changed files are then measured again."
            )
        if ticket.filler:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        return sample

    def _placeholder(self, fault: str) -> Sample:
        """Return a sample of one unsupervised token."""
        token = torch.tensor([self.encoder.processor.tokenizer.pad_token_id])
        labels, positions = torch.full_like(token, IGNORE), torch.zeros(3, 1, dtype=torch.int64)
        source = Source(self.name, fault.split(": ")[0])
        return {"input_ids": token, "labels": labels, "position_ids": positions, "source": source, "fault": fault}

    def _check_bad(self, measured: Lengths) -> None:
        bad = int((measured.status == BAD).sum())
        if bad > self.max_bad_fraction * len(measured.status):
            raise DataError(
                f"{self.name}: {bad} of {len(measured.status)} samples cannot be made, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}; the first: {measured.faults[0]}"
            )

    @property
    def index(self) -> NDArray[np.int64]:
        """int64[S], indices of the usable conversations of epoch 0."""
        return self.at(0).index

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[S], tokens of each sample of epoch 0."""
        return self.at(0).tokens

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """Kinds of media that every rank must run in every pass: ``image``, and ``video`` if a sample has one."""
        return ("image", "video") if self.at(0).measured.has_video.any() else ("image",)

    def summary(self) -> str:
        """Summarise epoch 0 in one line: samples, tokens, dropped records by reason, truncation."""
        planned = self.at(0)
        tokens, measured = planned.tokens, planned.measured
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in measured.dropped().items())
        line = f"{self.name}: {len(planned):,} samples, {int(tokens.sum()):,} tokens, mean {tokens.mean():.0f}"
        line = f"{line}, longest {tokens.max():,}" + (f"; left out: {dropped}" if dropped else "")
        line += f" (the first: {measured.faults[0]})" if measured.faults else ""
        samples, lost, media = measured.cut()
        cut = f"; cut: {samples:,} samples, by {lost:,} tokens" + (f" and {media:,} media" if media else "")
        return line + (cut if samples else "")


class PlanSampler(Sampler[list[Ticket]]):
    """Yields one rank's batches of an epoch, from the plan that all ranks compute.

    The number of batches is the same on every rank, and in every epoch whose samples have the same lengths. `set_epoch`
    selects the epoch. Skipping batches (resume) encodes nothing.

    Args:
        packing: False puts one sample in each row.
        max_length: most tokens of a row.
        shuffle: False keeps the order of samples and rows (evaluation).
        costs: estimates by which the ranks are balanced.
        grouped: put rows of similar cost into the same step, see `group_rows`.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        shape: RunShape,
        *,
        rank: int = 0,
        packing: bool = True,
        max_length: int,
        seed: int = 0,
        shuffle: bool = True,
        costs: CostModel = DEFAULT_COSTS,
        grouped: bool = False,
    ) -> None:
        self.dataset = dataset
        self.costs = costs
        self.grouped = grouped
        self.shape = shape
        self.rank = rank
        self.packing = packing
        self.max_length = max_length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._plans: dict[int, list[list[Batch]]] = {}
        self._passes: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows(self, epoch: int) -> list[list[int]]:
        """Return the rows of an epoch, before they are assigned to ranks."""
        lengths = self.dataset.at(epoch).tokens
        if not self.packing:
            return single_rows(len(lengths), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        return pack_lengths(lengths, max_length=self.max_length, seed=self.seed, epoch=epoch)

    def plan(self, epoch: int) -> list[list[Batch]]:
        """Return ``[pass][rank]`` -> batch of an epoch; the two epochs asked for last are cached."""
        if epoch not in self._plans:
            kept = list(self._plans.items())[-1:]
            planned = self.dataset.at(epoch)
            costs = self.costs.of(planned.tokens, planned.patches)
            rows: Sequence[Sequence[int]] = self.rows(epoch)
            if self.grouped:
                same_everywhere = DEFAULT_COSTS.of(planned.tokens, planned.patches)
                rows = group_rows(rows, same_everywhere, self.shape, seed=self.seed, epoch=epoch)
            passes = assign(rows, costs, self.shape, balance=self.shuffle)
            self._plans = dict(kept) | {epoch: passes}
        return self._plans[epoch]

    def passes(self, epoch: int) -> int:
        """Return the number of batches of an epoch on each rank."""
        same = self.dataset.measured_as(epoch)
        if same not in self._passes:
            self._passes[same] = -(-len(self.rows(epoch)) // self.shape.rows_per_pass)
        return self._passes[same]

    def steps(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        return -(-self.passes(epoch) // self.shape.accumulation)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (complete epochs, steps done in the next epoch) after ``step`` optimizer steps."""
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def waiting(self) -> float:
        """Return the mean excess cost of a step's slowest rank over its mean rank, in the current epoch; 0.1 is 10%."""
        planned = self.dataset.at(self.epoch)
        cost = self.costs.of(planned.tokens, planned.patches)
        loads = np.array([[cost[[i for i in b if i >= 0]].sum() for b in ranks] for ranks in self.plan(self.epoch)])
        begins = range(0, len(loads), self.shape.accumulation)
        steps = np.array([loads[i : i + self.shape.accumulation].sum(axis=0) for i in begins])  # [steps, ranks]
        whole = steps[:-1] if len(steps) > 1 else steps
        return float((whole.max(axis=1) / whole.mean(axis=1)).mean()) - 1

    def fill(self) -> float:
        """Return the share of the rows' capacity that holds tokens in the current epoch, 0 to 1."""
        return fill(self.rows(self.epoch), self.dataset.at(self.epoch).tokens, self.max_length)

    def __len__(self) -> int:
        return self.passes(self.epoch)

    def __iter__(self) -> Iterator[list[Ticket]]:
        for ranks in self.plan(self.epoch):
            yield [self.dataset.ticket(self.epoch, index) for index in ranks[self.rank]]


class EpochLoader(DataLoader[Any]):
    """A `DataLoader` over a `PlanSampler`, to which it passes the epoch.

    A generator of its own seeds the workers. So starting an epoch does not draw from torch's global generator, and
    dropout is the same for any number of workers.

    Args:
        options: keyword arguments of `DataLoader`.
    """

    def __init__(self, dataset: SampleDataset, sampler: PlanSampler, collator: Any, **options: Any) -> None:
        generator = torch.Generator().manual_seed(sampler.seed)
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collator, generator=generator, **options)

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def seen_samples(batches: Sequence[Batch]) -> int:
    """Count the samples of the batches, fillers excluded."""
    return sum(index >= 0 for batch in batches for index in batch)
