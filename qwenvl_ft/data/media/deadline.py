"""An end to work that may never come back: a disk that stalls, a decoder that hangs in a damaged file."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

Item = TypeVar("Item")

AHEAD = 2
"""Items that are made before they are asked for."""


def within(make: Callable[[], Iterator[Item]], seconds: float, late: Callable[[int], Exception]) -> Iterator[Item]:
    """The items of ``make()``, made in another thread.

    A thread that hangs in a system call or a C library cannot be stopped. It is left behind: it holds its memory, but
    neither this thread nor the end of the process waits for it. C code must release the interpreter's lock while it
    works, as PyAV does. A thread that is done is used again, so that memory which it has touched is.

    Args:
        seconds: that all items together may take.
        late: number of items that came in time -> the error to raise.
    """
    work = _Work(make)
    begin, count = monotonic(), 0
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.given.put(work)
    try:
        while True:
            try:
                kind, told = work.made.get(timeout=max(begin + seconds - monotonic(), 0.0))
            except queue.Empty:
                raise late(count) from None
            if kind == "error":
                raise told
            if kind == "end":
                return
            count += 1
            work.places.release()
            yield told
    finally:
        work.dropped = True
        work.places.release()  # so that a thread which waits to hand one over goes on, and ends


class _Work:
    """Items to make, and those that are made."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make
        self.made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.places = threading.Semaphore(AHEAD)
        self.dropped = False


class _Worker(threading.Thread):
    """Does one work after the other; idle between them, and gone with the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="deadline")
        self.given: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self._do(self.given.get())  # in a call of its own: an idle worker holds nothing of it

    def _do(self, work: _Work) -> None:
        last: tuple[str, Any] = ("end", None)
        try:
            for item in work.make():
                work.places.acquire()
                if work.dropped:
                    break
                work.made.put(("item", item))
                del item
        except BaseException as error:
            last = ("error", error)
        _idle.append(self)
        work.made.put(last)


_idle: list[_Worker] = []
"""Workers of this process that wait for work."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads
