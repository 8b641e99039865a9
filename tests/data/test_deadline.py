"""A thread that never returns is abandoned by the caller and does not keep the process alive."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

from qwenvl_ft.data.media import deadline
from qwenvl_ft.data.media.deadline import AHEAD, within
from qwenvl_ft.errors import DataError


def late(count):
    return DataError(f"late after {count}")


@pytest.fixture(autouse=True)
def ignore_earlier_threads(monkeypatch):
    """Do not count threads that other tests left hanging."""
    monkeypatch.setattr(sys.modules[__name__], "HANGING", set(busy()))


HANGING = set()


def busy():
    workers = {thread for thread in threading.enumerate() if thread.name == "deadline"}
    return workers - set(deadline._idle) - HANGING


def settles():
    """Return True if all workers finish within five seconds."""
    end = time.monotonic() + 5
    while busy() and time.monotonic() < end:
        time.sleep(0.01)
    return not busy()


def test_items_arrive_in_order_and_errors_are_passed_on():
    assert list(within(lambda: iter(range(1000)), 10, late)) == list(range(1000))

    def broken():
        yield 1
        raise KeyError("seven")

    items = within(broken, 10, late)
    assert next(items) == 1
    with pytest.raises(KeyError, match="seven"):
        next(items)


def test_a_hang_is_abandoned_and_reports_the_items_that_arrived():
    begin, (silent, pipe) = time.monotonic(), os.pipe()
    assert settles()

    def hangs():
        yield from range(3)
        os.read(silent, 1)

    with pytest.raises(DataError, match="late after 3"):
        list(within(hangs, 0.3, late))
    assert 0.25 < time.monotonic() - begin < 2
    assert len(busy()) == 1, "vacuous: it did not hang"
    assert list(within(lambda: iter(range(9)), 10, late)) == list(range(9)), "the next task does not wait"
    os.write(pipe, b"x")
    assert settles()


def test_the_worker_stops_when_the_consumer_stops():
    made = []

    def many():
        for number in range(100):
            made.append(number)
            yield number

    for number in within(many, 10, late):
        if number == 3:
            break
    assert settles()
    assert len(made) <= 3 + 1 + AHEAD + 2, "it runs ahead too far"


def test_one_thread_runs_consecutive_tasks_and_a_second_one_concurrent_tasks():
    def name():
        yield threading.get_ident()

    one = {next(iter(list(within(name, 10, late)))) for _ in range(50)}
    assert len(one) == 1
    assert threading.get_ident() not in one

    def many():
        for _ in range(10):
            yield threading.get_ident()

    outer = within(many, 10, late)
    first = next(outer)
    inner = set(within(many, 10, late))
    assert inner != {first}
    assert set(outer) == {first}
    assert settles()


def test_an_idle_worker_keeps_no_reference_to_its_items():
    class Item:
        pass

    made = []

    def many():
        for _ in range(3):
            item = Item()
            made.append(weakref.ref(item))
            yield item

    for items in (within(many, 10, late), within(many, 10, late)):
        next(items)
        items.close()
    assert settles()
    gc.collect()
    assert made
    assert not any(reference() for reference in made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_worker_of_its_own():
    assert list(within(lambda: iter([1]), 10, late)) == [1]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if list(within(lambda: iter([1]), 2, late)) == [1] else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_process_ends_although_a_thread_hangs():
    code = """
import os
from qwenvl_ft.data.media.deadline import within
silent, _ = os.pipe()
def hangs():
    yield os.read(silent, 1)
try:
    list(within(hangs, 0.1, lambda count: TimeoutError("left")))
except TimeoutError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "left\n"
