"""Work that never comes back is left behind: by the caller, and by the end of the process."""

import os
import subprocess
import sys
import threading
import time

import pytest

from qwenvl_ft.data.deadline import AHEAD, within
from qwenvl_ft.errors import DataError


def late(count):
    return DataError(f"late after {count}")


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "deadline"]


def test_items_come_in_order_and_errors_are_the_workers_own():
    assert list(within(lambda: iter(range(1000)), 10, late)) == list(range(1000))

    def broken():
        yield 1
        raise KeyError("seven")

    items = within(broken, 10, late)
    assert next(items) == 1
    with pytest.raises(KeyError, match="seven"):
        next(items)


def test_a_hang_is_left_and_says_how_far_it_came():
    begin, (silent, pipe) = time.monotonic(), os.pipe()
    before = len(workers())

    def hangs():
        yield from range(3)
        os.read(silent, 1)

    with pytest.raises(DataError, match="late after 3"):
        list(within(hangs, 0.3, late))
    assert 0.25 < time.monotonic() - begin < 2
    assert len(workers()) == before + 1, "vacuous: it did not hang"
    os.write(pipe, b"x")
    for thread in workers():
        thread.join(5)
    assert not workers()


def test_who_stops_asking_stops_the_work():
    made = []

    def many():
        for number in range(100):
            made.append(number)
            yield number

    for number in within(many, 10, late):
        if number == 3:
            break
    for thread in workers():
        thread.join(5)
    assert not workers()
    assert len(made) <= 3 + 1 + AHEAD + 2, "it goes no further ahead than it may"


def test_the_process_ends_though_a_thread_hangs():
    code = """
import os
from qwenvl_ft.data.deadline import within
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
