"""An end to work that may never come back: a disk that stalls, a decoder that hangs in a damaged file."""

import queue
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

Item = TypeVar("Item")

AHEAD = 2
"""Items that are made before they are asked for."""


def within(make: Callable[[], Iterator[Item]], seconds: float, late: Callable[[int], Exception]) -> Iterator[Item]:
    """The items of ``make()``, made in a thread of its own.

    A thread that hangs in a system call or a C library cannot be stopped. It is left behind: it holds its memory, but
    neither this thread nor the end of the process waits for it. C code must release the interpreter's lock while it
    works, as PyAV does.

    Args:
        seconds: that all items together may take.
        late: number of items that came in time -> the error to raise.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(AHEAD)
    dropped = threading.Event()
    worker = threading.Thread(target=_fill, args=(make, items, dropped), daemon=True, name="deadline")
    begin, count = monotonic(), 0
    worker.start()
    try:
        while True:
            try:
                kind, told = items.get(timeout=max(begin + seconds - monotonic(), 0.0))
            except queue.Empty:
                raise late(count) from None
            if kind == "error":
                raise told
            if kind == "end":
                return
            count += 1
            yield told
    finally:
        dropped.set()
        while not items.empty():
            items.get_nowait()  # so that a thread which waits to hand one over goes on, and ends


def _fill(make: Callable[[], Iterator[Any]], items: queue.Queue[tuple[str, Any]], dropped: threading.Event) -> None:
    try:
        for item in make():
            items.put(("item", item))
            if dropped.is_set():
                return
    except BaseException as error:
        items.put(("error", error))
    else:
        items.put(("end", None))
