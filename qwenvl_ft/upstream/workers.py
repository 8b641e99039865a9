"""Borrowed: what a process does when it cannot put something in a queue of `multiprocessing`.

``multiprocessing.queues.Queue._on_queue_feeder_error(error, item)``, a static method that the standard library keeps
for `concurrent.futures` to override: Python 3.7 to 3.14. It runs in the queue's feeding thread; by itself it prints the
error, and the queue goes on without the item. There is no public way to hear of it: the queue pickles what it is given
later, in that thread.

Where it is missing, a batch that cannot be handed over is only printed, and the run waits for it (`LOUD`).
"""

from __future__ import annotations

import inspect
import multiprocessing.queues
import os
import traceback
from functools import cache
from typing import Any

from qwenvl_ft.upstream.probe import Feature, lacks

HOOK = "_on_queue_feeder_error"


def end_with_lost_items() -> None:
    """From now on, this process ends where an item cannot be put in a queue."""
    if not LOUD.missing():
        setattr(multiprocessing.queues.Queue, HOOK, staticmethod(_end))


def _end(error: Exception, item: Any) -> None:
    traceback.print_exception(error)
    os._exit(1)


@cache
def _no_hook() -> str:
    if missing := lacks(multiprocessing.queues.Queue, (HOOK,)):
        return f"this Python {missing}"
    parameters = inspect.signature(getattr(multiprocessing.queues.Queue, HOOK)).parameters
    return "" if len(parameters) == 2 else f"this Python has another Queue.{HOOK}"


LOUD = Feature(
    name="loader workers that end when a batch is lost",
    packages=(),
    missing=_no_hook,
    instead="an error in handing a batch over is printed, and the run waits for the batch",
)
FEATURES = (LOUD,)
