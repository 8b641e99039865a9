"""One function over all records: the results come in order, whoever computes them."""

import os

import pytest
import torch

from qwenvl_ft.data.plan.walk import walk


def squared(records, index):
    return records[index] ** 2, os.getpid()


def test_results_come_in_order_from_workers_and_from_this_process():
    records = list(range(100))
    for parallel_from, elsewhere in ((100, True), (101, False)):
        found = list(walk(records, squared, num_proc=2, quiet=True, chunk=8, parallel_from=parallel_from))
        assert [square for square, _ in found] == [n**2 for n in records]
        assert (os.getpid() not in {process for _, process in found}) == elsewhere


@pytest.mark.parametrize("parallel_from", [1, 1000])
def test_the_global_random_state_stays(parallel_from):
    state = torch.get_rng_state()
    list(walk(list(range(20)), squared, num_proc=2, quiet=True, parallel_from=parallel_from))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_workers_a_result_comes_before_the_next_record_is_read():
    read = []
    results = walk([5, 6, 7], lambda records, index: read.append(index) or records[index])
    assert (next(results), read) == (5, [0])
