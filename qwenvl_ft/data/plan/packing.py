"""Packs samples into rows and assigns the rows to ranks: the plan of an epoch.

A plan is a pure function of (lengths, costs, seed, epoch) and the run's shape. So every rank computes the same plan,
and a resumed run continues it. A sample is never split. One million lengths take a few seconds on one core.
Letters in shapes: N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qwenvl_ft.errors import DataError

WASTE = 0.005
"""Share of the mean length that rounding may waste. Samples of equal rounded length swap places between epochs."""

WINDOW = 64
"""Optimizer steps among which `group_rows` exchanges rows."""


def pack_lengths(lengths: ArrayLike, *, max_length: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Pack samples into rows of ``max_length`` tokens by best-fit decreasing.

    Samples are placed from the longest to the shortest, each into the fullest row that has room for it. In every epoch
    samples of (nearly) equal length are exchanged at random and the rows are shuffled; the number of rows is the same
    in all epochs.

    Args:
        lengths: int[N], tokens of each sample, from 1 to ``max_length``.
        max_length: maximum number of tokens of a row.

    Returns:
        Rows of indices into ``lengths``; every index is in exactly one row.

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
    units = np.minimum(-(-sizes // unit), capacity)  # rounded above the capacity: fills a row alone
    shuffled = rng.permutation(sizes.size)
    order = shuffled[np.argsort(-units[shuffled], kind="stable")]  # [N] longest first, ties at random
    rows = _best_fit(order.tolist(), units[order].tolist(), capacity)
    return [rows[i] for i in rng.permutation(len(rows))]


def _best_fit(order: list[int], units: list[int], capacity: int) -> list[list[int]]:
    """Put each item into the row with the least sufficient space; ``units`` must not increase.

    Bit k of ``open_rows`` is set if some row has k units of space left. So finding the best fit takes a shift and the
    lowest set bit, for any number of rows.
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
    """Number of rows in an optimizer step, and how they are divided over ranks and forward passes."""

    data_ranks: int = 1
    """Ranks that get different rows. A group of ranks that train their rows together counts once."""
    rows_per_batch: int = 1
    """Rows of a micro-batch, which one rank joins into a forward pass (``per_device_train_batch_size``)."""
    accumulation: int = 1
    """Forward passes of a rank in an optimizer step (``gradient_accumulation_steps``)."""
    ranks_per_row: int = 1
    """Ranks that train a row together (``sequence_parallel_size``)."""

    @property
    def rows_per_pass(self) -> int:
        """Rows of one forward pass, over all ranks."""
        return self.data_ranks * self.rows_per_batch


def group_rows(
    rows: Sequence[Sequence[int]], costs: ArrayLike, shape: RunShape, *, seed: int = 0, epoch: int = 0
) -> list[Sequence[int]]:
    """Put rows of similar cost into the same optimizer step, so that ranks with one row per step wait less.

    The rows of every `WINDOW` steps are sorted by cost and divided into steps again, in random order. The rows of an
    incomplete last step stay last.

    Args:
        rows: from `pack_lengths` or `single_rows`, in random order.
        costs: float[N], cost of each sample; must be the same on all machines, because it decides the steps.
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
"""Indices of the samples of one batch. ``~i`` (negative) is sample i as a filler, that is, without labels."""


def assign(
    rows: Sequence[Sequence[int]], costs: ArrayLike, shape: RunShape, *, balance: bool = True
) -> list[list[Batch]]:
    """Assign the rows of an epoch to forward passes and ranks.

    An optimizer step takes the next ``data_ranks * rows_per_batch * accumulation`` rows, for any number of ranks.
    Within a step, rows of similar cost share a pass, and the most expensive row of a pass goes to the rank with the
    lowest cost so far, so that ranks wait little. If the epoch's last pass has no row left for a rank, that rank
    repeats the cheapest sample of the step without labels: it takes part in every collective operation and contributes
    nothing.

    Args:
        rows: indices of samples, from `pack_lengths` or `single_rows`.
        costs: float[N], cost of each sample, in any unit.
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
        load = [0.0] * shape.data_ranks
        for first in range(0, len(step), shape.rows_per_pass):
            chosen = order[first : first + shape.rows_per_pass]
            batches = _assign_pass([step[i] for i in chosen], [weights[i] for i in chosen], shape.rows_per_batch, load)
            passes.append([batch or [filler] for batch in batches])
    return passes


def _assign_pass(
    rows: list[Sequence[int]], weights: list[float], rows_per_batch: int, load: list[float]
) -> list[Batch]:
    """Assign the rows of one pass, each to the rank with the least ``load`` that has room; ``load`` is updated."""
    batches: list[Batch] = [[] for _ in load]
    num_rows = [0] * len(load)
    for row, weight in zip(rows, weights, strict=True):
        rank = min((r for r in range(len(load)) if num_rows[r] < rows_per_batch), key=lambda r: (load[r], r))
        batches[rank].extend(row)
        load[rank] += weight
        num_rows[rank] += 1
    return batches


def single_rows(count: int, *, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Make rows of one sample each, for ``packing: false``."""
    order = np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)
    return [[int(i)] for i in order]


def fill(rows: Sequence[Sequence[int]], lengths: ArrayLike, max_length: int) -> float:
    """Return the share of the rows' capacity that holds tokens, 0 to 1."""
    sizes = np.asarray(lengths)
    tokens = sum(int(sizes[list(row)].sum()) for row in rows)
    return tokens / (len(rows) * max_length) if rows else 0.0


__all__ = ["Batch", "RunShape", "assign", "fill", "group_rows", "pack_lengths", "single_rows"]
