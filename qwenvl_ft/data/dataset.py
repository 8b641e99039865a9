"""Records, encoder and lengths joined: samples by index, and the epochs' plan that serves them in rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from qwenvl_ft.data.conversation import Sample
from qwenvl_ft.data.draft import IGNORE
from qwenvl_ft.data.encode import Encoder
from qwenvl_ft.data.lengths import Lengths, measure, require_some
from qwenvl_ft.data.packing import Batch, RunShape, assign, fill, pack_lengths, single_rows
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError


class SampleDataset(Dataset[Sample]):
    """The samples of a data set; what cannot become one (too long, unsupervised) is counted and left out.

    ``dataset[i]`` encodes the i-th usable record. ``dataset[~i]`` is the same without labels: a filler, see `assign`.

    Raises:
        DataError: nothing is usable, or a record is malformed.
    """

    def __init__(
        self,
        records: Any,
        encoder: Encoder,
        *,
        name: str = "data",
        num_proc: int = 1,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.records = records
        self.encoder = encoder
        self.name = name
        self.measured: Lengths = measure(records, encoder, num_proc=num_proc, cache_dir=cache_dir)
        require_some(self.measured, name)
        self.index = self.measured.kept
        self.lengths = self.measured.tokens[self.index].astype(np.int64)
        self.patches = self.measured.patches[self.index].astype(np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        place = index if index >= 0 else ~index
        record, source, media_root = self.records[int(self.index[place])]
        sample = self.encoder(read_record(record, source, media_root))
        if len(sample["input_ids"]) != self.lengths[place]:
            raise DataError(
                f"{source}: planned with {self.lengths[place]} tokens, encoded to {len(sample['input_ids'])}. "
                "Was a medium changed after planning? Start again: changed media are measured anew."
            )
        if index < 0:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        return sample

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """``image``, and ``video`` if a sample has one: the kinds that every rank must run in every pass."""
        return ("image", "video") if self.measured.has_video[self.index].any() else ("image",)

    @property
    def costs(self) -> NDArray[np.float64]:
        """Relative time of each sample: its tokens, its patches, and the squares that attention costs."""
        tokens, patches = self.lengths.astype(np.float64), self.patches.astype(np.float64)
        return tokens + 0.25 * patches + tokens**2 / 32_768 + patches**2 / 262_144

    def summary(self) -> str:
        """One line: samples, tokens, and what was left out and why."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.measured.dropped().items())
        told = f"{self.name}: {len(self):,} samples, {int(self.lengths.sum()):,} tokens, mean {self.lengths.mean():.0f}"
        told = f"{told}, longest {self.lengths.max():,}" + (f"; left out: {dropped}" if dropped else "")
        samples, tokens, media = self.measured.cut()
        lost = f"; cut: {samples:,} samples, by {tokens:,} tokens" + (f" and {media:,} media" if media else "")
        return told + (lost if samples else "")


class PlanSampler(Sampler[Batch]):
    """This rank's batches of an epoch, from a plan that all ranks make alike.

    The number of batches is the same in every epoch and on every rank. `set_epoch` chooses the epoch; skipping batches
    (resume) only advances through indices.
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
    ) -> None:
        self.dataset = dataset
        self.shape = shape
        self.rank = rank
        self.packing = packing
        self.max_length = max_length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._plans: dict[int, list[list[Batch]]] = {}
        self._costs = dataset.costs

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, before they are dealt out."""
        if not self.packing:
            return single_rows(len(self.dataset), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        return pack_lengths(self.dataset.lengths, max_length=self.max_length, seed=self.seed, epoch=epoch)

    def plan(self, epoch: int) -> list[list[Batch]]:
        """``[pass][rank]`` of an epoch; the last two asked for are kept."""
        if epoch not in self._plans:
            kept = list(self._plans.items())[-1:]
            self._plans = dict(kept) | {epoch: assign(self.rows(epoch), self._costs, self.shape, balance=self.shuffle)}
        return self._plans[epoch]

    def fill(self) -> float:
        """Share of the packed rows' places that hold a token, in the current epoch."""
        return fill(self.rows(self.epoch), self.dataset.lengths, self.max_length)

    def __len__(self) -> int:
        return len(self.plan(self.epoch))

    def __iter__(self) -> Iterator[Batch]:
        for ranks in self.plan(self.epoch):
            yield ranks[self.rank]


class EpochLoader(DataLoader[Any]):
    """A `DataLoader` over a `PlanSampler` that passes the epoch on to it.

    Its own generator seeds the workers, so that starting an epoch leaves torch's global random state alone: dropout is
    the same however many workers there are.
    """

    def __init__(self, dataset: SampleDataset, sampler: PlanSampler, collator: Any, **options: Any) -> None:
        generator = torch.Generator().manual_seed(sampler.seed)
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collator, generator=generator, **options)

    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def seen_samples(batches: Sequence[Batch]) -> int:
    """Samples of the batches, fillers not counted."""
    return sum(index >= 0 for batch in batches for index in batch)
