"""A time limit for work that may never return: a disk that stalls, a decoder that hangs in a damaged file."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

Item = TypeVar("Item")

AHEAD = 2
"""Number of items that the thread produces ahead of the consumer."""


def within(produce: Callable[[], Iterator[Item]], seconds: float, late: Callable[[int], Exception]) -> Iterator[Item]:
    """Yield the items of ``produce()``, which runs in another thread, and raise if they take too long.

    A thread that hangs in a system call or a C library cannot be stopped. It is abandoned: it keeps its memory, but
    neither this thread nor the end of the process waits for it. C code must release the GIL while it works, as PyAV
    does. Idle threads are reused, so that the memory which they have touched is reused too.

    Args:
        seconds: time limit for all items together.
        late: number of items that arrived in time -> the error to raise.
    """
    task = _Task(produce)
    begin, count = monotonic(), 0
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.tasks.put(task)
    try:
        while True:
            try:
                kind, value = task.results.get(timeout=max(begin + seconds - monotonic(), 0.0))
            except queue.Empty:
                raise late(count) from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            count += 1
            task.slots.release()
            yield value
    finally:
        task.cancelled = True
        task.slots.release()  # wakes a thread that waits for a slot, so that it can end


class _Task:
    """An iterator to run and the queue of its results."""

    def __init__(self, produce: Callable[[], Iterator[Any]]) -> None:
        self.produce = produce
        self.results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.slots = threading.Semaphore(AHEAD)
        self.cancelled = False


class _Worker(threading.Thread):
    """A daemon thread that runs one task after the other."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="deadline")
        self.tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self._run_task(self.tasks.get())  # a call of its own, so that an idle worker keeps no reference to the task

    def _run_task(self, task: _Task) -> None:
        last: tuple[str, Any] = ("end", None)
        try:
            for item in task.produce():
                task.slots.acquire()
                if task.cancelled:
                    break
                task.results.put(("item", item))
                del item
        except BaseException as error:
            last = ("error", error)
        _idle.append(self)
        task.results.put(last)


_idle: list[_Worker] = []
"""Workers of this process that wait for a task."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a forked child has none of its parent's threads
