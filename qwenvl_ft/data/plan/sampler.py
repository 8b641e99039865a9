"""Yields each rank's batches from the epoch's plan, and loads them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.dataset import SampleDataset, Ticket, Totals
from qwenvl_ft.data.plan.packing import Batch, RunShape, assign, fill, group_rows, pack_lengths, single_rows
from qwenvl_ft.data.plan.step_size import StepSize

DEFAULT_COSTS = CostModel()


class PlanSampler(Sampler[list[Ticket]]):
    """Yields one rank's batches of an epoch, from the plan that all ranks compute.

    The number of batches is the same on every rank, and in every epoch whose samples have the same lengths. `set_epoch`
    selects the epoch. Skipping batches (resume) encodes nothing.

    Args:
        rank: of the ``shape.data_ranks``.
        packing: False puts one sample in each row.
        max_length: maximum number of tokens of a row.
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
        self.epoch = dataset.first
        self._plans: dict[int, list[list[Batch]]] = {}
        self._totals: dict[int, Totals] = {}

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
                # The steps must not depend on the machine, so the fitted costs are not used here.
                same_everywhere = DEFAULT_COSTS.of(planned.tokens, planned.patches)
                rows = group_rows(rows, same_everywhere, self.shape, seed=self.seed, epoch=epoch)
            passes = assign(rows, costs, self.shape, balance=self.shuffle)
            self._plans = dict(kept) | {epoch: passes}
        return self._plans[epoch]

    def totals(self, epoch: int) -> Totals:
        """Return what an epoch trains."""
        same = self.dataset.measured_as(epoch)
        if same not in self._totals:
            planned = self.dataset.at(epoch)
            passes = -(-len(self.rows(epoch)) // self.shape.rows_per_pass)
            steps = -(-passes // self.shape.accumulation)
            self._totals[same] = Totals(steps, passes, int(planned.tokens.sum()), len(planned))
        return self._totals[same]

    def before(self, epoch: int) -> Totals:
        """Return what the epochs before one train."""
        done = self.dataset.before
        for earlier in range(self.dataset.first, epoch):
            done = done.plus(self.totals(earlier))
        return done

    def passes(self, epoch: int) -> int:
        """Return the number of batches of an epoch on each rank."""
        return self.totals(epoch).passes

    def steps(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        return self.totals(epoch).steps

    def step_size(self, epoch: int) -> StepSize:
        """Return what the optimizer steps of an epoch hold."""
        return StepSize(self.shape, len(self.rows(epoch)), len(self.dataset.at(epoch)), self.packing)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (complete epochs, steps done in the next epoch) after ``step`` optimizer steps.

        After the last step of an epoch it is (that epoch, all its steps) if the next one cannot be planned yet.
        """
        epoch, step = self.dataset.first, step - self.dataset.before.steps
        while step >= self.steps(epoch) and self.dataset.has_begun(epoch + 1):
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
