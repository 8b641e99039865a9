"""Which samples share a row, and which row goes to which rank: the plan of an epoch.

A plan is a pure function of (lengths, costs, seed, epoch) and the shape of the run, so every rank makes the same one
and a resumed run continues it. A sample is never split. One million lengths take a few seconds on one core.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qwenvl_ft.errors import DataError

WASTE = 0.005
"""Share of a mean sample that rounding lengths may cost: lengths that round alike swap places from epoch to epoch."""


WINDOW = 64
"""Steps among which `group_rows` exchanges rows."""


def pack_lengths(lengths: ArrayLike, *, max_length: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Fill rows of ``max_length`` tokens: best-fit decreasing, seeded.

    The longest sample goes first, each into the fullest row that still takes it. Samples of (nearly) equal length are
    exchanged at random with every epoch, and the rows are shuffled; the number of rows is the same in all epochs.

    Args:
        lengths: int[N], tokens of each sample; each at least 1 and at most ``max_length``.
        max_length: most tokens of a row.

    Returns:
        Rows of indices into ``lengths``; every index stands in exactly one row.

    Raises:
        DataError: a length is out of range.

    Example:
        ``pack_lengths([6, 3, 2, 5], max_length=8)`` gives the rows ``{0, 2}`` and ``{1, 3}`` in some order.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if sizes.min() < 1 or sizes.max() > max_length:
        wrong = int(np.flatnonzero((sizes < 1) | (sizes > max_length))[0])
        raise DataError(
            f"sample {wrong} has {sizes[wrong]} tokens, but a row takes 1 to {max_length}. "
            "Raise template.max_length, or set template.truncation_strategy to delete, left or right."
        )
    rng = np.random.default_rng([seed, epoch])
    unit = max(1, int(WASTE * 2 * sizes.mean()))
    capacity = max_length // unit
    units = np.minimum(-(-sizes // unit), capacity)  # what rounds above the capacity stands alone
    shuffled = rng.permutation(sizes.size)
    order = shuffled[np.argsort(-units[shuffled], kind="stable")]  # [N] longest first, equals at random
    rows = _best_fit(order.tolist(), units[order].tolist(), capacity)
    return [rows[i] for i in rng.permutation(len(rows))]


def _best_fit(order: list[int], units: list[int], capacity: int) -> list[list[int]]:
    """Put each item into the row with the least space that takes it; ``units`` must not rise.

    ``open_rows`` has a bit for each amount of space that some row has left, so that the best fit is one shift and one
    lowest set bit, whatever the number of rows.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rows = 0
    for item, size in zip(order, units, strict=True):
        fits = open_rows >> size
        if fits:
            space = size + (fits & -fits).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_rows ^= 1 << space
            rows[row].append(item)
        else:
            space, row = capacity, len(rows)
            rows.append([item])
        left = space - size
        if left:
            by_space[left].append(row)
            open_rows |= 1 << left
    return rows


@dataclass(frozen=True)
class RunShape:
    """How many rows an optimizer step takes, and who takes them."""

    world_size: int = 1
    rows_per_batch: int = 1
    """Rows that one process joins into one forward pass (``per_device_train_batch_size``)."""
    accumulation: int = 1
    """Forward passes in an optimizer step (``gradient_accumulation_steps``)."""

    @property
    def rows_per_pass(self) -> int:
        return self.world_size * self.rows_per_batch


def group_rows(
    rows: Sequence[Sequence[int]], costs: ArrayLike, shape: RunShape, *, seed: int = 0, epoch: int = 0
) -> list[Sequence[int]]:
    """Let rows of like cost share an optimizer step, so that ranks wait less where each takes one row a step.

    Of every `WINDOW` steps the rows are sorted by cost and cut into steps anew, whose order is drawn; rows of a last
    step that is not whole stay last.

    Args:
        rows: from `pack_lengths` or single, in random order.
        costs: float[N] of each sample; the same on all machines, since steps follow from it.
    """
    cost, rng = np.asarray(costs, dtype=np.float64), np.random.default_rng([seed, epoch, WINDOW])
    size = shape.rows_per_pass * shape.accumulation
    whole = len(rows) // size * size
    grouped: list[Sequence[int]] = []
    for begin in range(0, whole, WINDOW * size):
        window = rows[begin : min(begin + WINDOW * size, whole)]
        order = np.argsort([-float(cost[list(row)].sum()) for row in window], kind="stable")
        for step in rng.permutation(len(window) // size):
            grouped.extend(window[i] for i in order[step * size : (step + 1) * size])
    return grouped + list(rows[whole:])


Batch = list[int]
"""Indices of the samples of one batch. ``~i`` (negative) is sample i as a filler: present, but without a label."""


def assign(
    rows: Sequence[Sequence[int]], costs: ArrayLike, shape: RunShape, *, balance: bool = True
) -> list[list[Batch]]:
    """Deal the rows of an epoch out to forward passes and ranks.

    The rows of an optimizer step are the next ``world_size * rows_per_batch * accumulation`` of ``rows``, however many
    processes share them. Within a step, rows of like cost meet in the same pass, and the costliest of a pass goes to
    the rank that has had the least so far, so that no rank waits. Where the last pass of the epoch has no row left for
    a rank, the rank repeats the cheapest sample of the step without labels: it takes part in every collective
    operation and contributes nothing.

    Args:
        rows: indices of samples, from `pack_lengths` or single.
        costs: float[N] of each sample, in any unit.
        balance: False keeps the order of ``rows`` (evaluation).

    Returns:
        ``[pass][rank]`` -> batch.
    """
    cost = np.asarray(costs, dtype=np.float64)
    passes: list[list[Batch]] = []
    rows_per_step = shape.rows_per_pass * shape.accumulation
    for begin in range(0, len(rows), rows_per_step):
        step = list(rows[begin : begin + rows_per_step])
        weights = [float(sum(cost[i] for i in row)) for row in step]
        order = sorted(range(len(step)), key=lambda i: (-weights[i], i)) if balance else list(range(len(step)))
        filler = ~min((i for row in step for i in row), key=lambda i: (cost[i], i))
        load = [0.0] * shape.world_size
        for first in range(0, len(step), shape.rows_per_pass):
            chosen = order[first : first + shape.rows_per_pass]
            batches = _deal([step[i] for i in chosen], [weights[i] for i in chosen], shape.rows_per_batch, load)
            passes.append([batch or [filler] for batch in batches])
    return passes


def _deal(rows: list[Sequence[int]], weights: list[float], rows_per_batch: int, load: list[float]) -> list[Batch]:
    """One pass: each row to the rank with the least ``load`` (which grows) that still has a place."""
    batches: list[Batch] = [[] for _ in load]
    held = [0] * len(load)
    for row, weight in zip(rows, weights, strict=True):
        rank = min((r for r in range(len(load)) if held[r] < rows_per_batch), key=lambda r: (load[r], r))
        batches[rank].extend(row)
        load[rank] += weight
        held[rank] += 1
    return batches


def single_rows(count: int, *, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Rows of one sample each, for ``packing: false``."""
    order = np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
    return [[int(i)] for i in order]


def fill(rows: Sequence[Sequence[int]], lengths: ArrayLike, max_length: int) -> float:
    """Share of the rows' places that hold a token, 0 to 1."""
    sizes = np.asarray(lengths)
    tokens = sum(int(sizes[list(row)].sum()) for row in rows)
    return tokens / (len(rows) * max_length) if rows else 0.0


__all__ = ["Batch", "RunShape", "assign", "fill", "group_rows", "pack_lengths", "single_rows"]
