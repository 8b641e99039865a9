"""The plan of an epoch is complete, full, seeded, balanced, and the same for any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest

from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.packing import RunShape, assign, fill, group_rows, pack_lengths
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.errors import DataError


def lognormal(count, max_length=8192, seed=0):
    lengths = np.random.default_rng(seed).lognormal(6, 0.9, count).astype(int)
    return np.clip(lengths, 1, max_length)


def test_every_index_is_in_exactly_one_row_and_no_row_overflows():
    lengths = lognormal(5_000)
    rows = pack_lengths(lengths, max_length=8192, seed=3)
    assert sorted(i for row in rows for i in row) == list(range(5_000))
    assert max(lengths[row].sum() for row in rows) <= 8192


@pytest.mark.parametrize(("mu", "sigma"), [(6, 0.8), (5, 1.2), (7, 0.6), (7.5, 0.9)])
def test_rows_are_at_least_98_percent_full(mu, sigma):
    lengths = np.clip(np.random.default_rng(1).lognormal(mu, sigma, 50_000).astype(int), 1, 8192)
    assert fill(pack_lengths(lengths, max_length=8192), lengths, 8192) >= 0.98
    in_order = fill([[i] for i in range(len(lengths))], lengths, 8192)
    assert in_order < 0.98, "vacuous: single samples fill rows too"


def test_the_plan_is_a_function_of_seed_and_epoch():
    lengths = lognormal(2_000)
    plan = pack_lengths(lengths, max_length=8192, seed=1, epoch=2)
    assert plan == pack_lengths(lengths, max_length=8192, seed=1, epoch=2)
    assert plan != pack_lengths(lengths, max_length=8192, seed=1, epoch=3)
    assert plan != pack_lengths(lengths, max_length=8192, seed=2, epoch=2)


def test_every_epoch_has_the_same_number_of_rows_and_other_neighbours():
    lengths = lognormal(3_000)
    epochs = [pack_lengths(lengths, max_length=8192, epoch=epoch) for epoch in range(6)]
    assert len({len(rows) for rows in epochs}) == 1
    neighbours = [{frozenset((row[0], i)) for row in rows for i in row[1:]} for rows in epochs]
    assert len(neighbours[0] & neighbours[1]) < 0.2 * len(neighbours[0])


def test_lengths_that_fit_no_row_are_an_error():
    with pytest.raises(DataError, match=r"sample 1 has 9 tokens, but a row takes 1 to 8\. Raise template\.max_length"):
        pack_lengths([3, 9], max_length=8)
    with pytest.raises(DataError, match="sample 0 has 0 tokens"):
        pack_lengths([0, 3], max_length=8)
    assert pack_lengths([], max_length=8) == []


def test_exact_fits_are_found():
    rows = pack_lengths([6, 3, 2, 5], max_length=8)
    assert sorted(sorted(row) for row in rows) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("shape", [RunShape(1, 1, 4), RunShape(2, 1, 2), RunShape(4, 1, 1), RunShape(2, 2, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(shape):
    lengths = lognormal(400)
    rows = pack_lengths(lengths, max_length=8192)
    plan = assign(rows, lengths, shape)
    steps = [plan[i : i + shape.accumulation] for i in range(0, len(plan), shape.accumulation)]
    found = [sorted(i for passes in step for batch in passes for i in batch if i >= 0) for step in steps]
    assert found == [sorted(i for row in rows[k : k + 4] for i in row) for k in range(0, len(rows), 4)]


def test_a_rank_without_a_row_repeats_the_cheapest_sample_as_a_filler():
    plan = assign([[0], [1], [2]], [5.0, 1.0, 9.0], RunShape(data_ranks=2))
    assert [len(passes) for passes in plan] == [2, 2]
    assert plan[-1] == [[2], [~2]]
    real = [i for passes in plan for batch in passes for i in batch if i >= 0]
    assert sorted(real) == [0, 1, 2]


def test_waiting_is_the_excess_of_the_costliest_rank_over_the_mean():
    lengths, patches = np.array([100, 200, 300, 400, 50]), np.zeros(5, dtype=int)
    planned = SimpleNamespace(tokens=lengths, patches=patches)
    data = SimpleNamespace(at=lambda epoch: planned, measured_as=lambda epoch: 0, first=0)
    costs = CostModel(token_square=0.0)
    sampler = PlanSampler(data, RunShape(2), packing=False, max_length=400, costs=costs)
    sampler._plans[0] = [[[0], [1]], [[2], [3]], [[4], [~0]]]
    assert sampler.waiting() == pytest.approx((200 / 150 + 400 / 350) / 2 - 1)


@pytest.mark.parametrize("world", [2, 8, 64])
def test_grouped_rows_balance_ranks_that_take_one_row_a_step(world):
    lengths = lognormal(60_000)
    rows = pack_lengths(lengths, max_length=8192)
    vision = np.random.default_rng(1).choice([0.0, 0.5, 3.0], size=lengths.size)
    cost = lengths * (1 + vision) + lengths.astype(float) ** 2 / 32_768
    shape = RunShape(data_ranks=world)

    def waiting(rows):
        plan = assign(rows, cost, shape)[: len(rows) // world]
        loads = np.array([[cost[batch].sum() for batch in passes] for passes in plan])
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    grouped = group_rows(rows, cost, shape)
    assert waiting(grouped) < 1.03
    assert waiting(rows) > 1.05, "vacuous: any rows balance the ranks"
    assert sorted(map(tuple, grouped)) == sorted(map(tuple, rows))
    whole = len(rows) // world * world
    assert grouped[whole:] == rows[whole:]
    again = group_rows(rows, cost, RunShape(accumulation=world))
    assert again == grouped, "the same steps, however many processes share them"
    assert group_rows(rows, cost, shape, epoch=1) != grouped


def test_ranks_get_rows_of_similar_cost():
    lengths = lognormal(20_000)
    rows = pack_lengths(lengths, max_length=8192)
    vision = np.random.default_rng(1).choice([0.0, 0.5, 3.0], size=lengths.size)  # the share differs by sample
    cost = lengths * (1 + vision) + lengths.astype(float) ** 2 / 32_768
    shape = RunShape(data_ranks=4, accumulation=8)

    def waiting(plan):
        """Return the slowest rank's cost divided by the mean rank's, averaged over the steps."""
        loads = np.array([[cost[batch].sum() for batch in passes] for passes in plan]).reshape(-1, 8, 4).sum(axis=1)
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    whole_steps = len(rows) // 32 * 8
    assert waiting(assign(rows, cost, shape)[:whole_steps]) < 1.03
    assert waiting(assign(rows, cost, shape, balance=False)[:whole_steps]) > 1.05, "vacuous: any order balances"
