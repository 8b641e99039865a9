"""Makes a dataloader worker exit when a batch cannot be pickled, so that the run does not wait for the batch forever.

Relies on ``multiprocessing.queues.Queue._on_queue_feeder_error(error, item)``, a static method that the standard
library has for `concurrent.futures` to override, Python 3.7 to 3.14. It runs in the queue's feeder thread. By default
it prints the error, and the queue continues without the item. There is no public way to catch the error, because the
queue pickles items later, in that thread.

If it is missing, the error about a lost batch is only printed, and the run waits for the batch (`LOUD`).
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
STDERR = 2
"""File descriptor of the standard error stream."""


def end_with_lost_items() -> None:
    """Make this process exit, from now on, when an item cannot be put in a queue."""
    if not LOUD.missing():
        setattr(multiprocessing.queues.Queue, HOOK, staticmethod(_end))


def _end(error: Exception, item: Any) -> None:
    """Print the error and exit, also where ``sys.stderr`` is closed or its lock was held when this process forked."""
    try:
        os.write(STDERR, "".join(traceback.format_exception(error)).encode())
    finally:
        os._exit(1)


@cache
def _no_hook() -> str:
    if missing := lacks(multiprocessing.queues.Queue, (HOOK,)):
        return f"this Python {missing}"
    parameters = inspect.signature(getattr(multiprocessing.queues.Queue, HOOK)).parameters
    return "" if len(parameters) == 2 else f"this Python has another Queue.{HOOK}"


LOUD = Feature(
    name="dataloader workers that exit when a batch is lost",
    packages=(),
    missing=_no_hook,
    instead="if a batch cannot be pickled, the error is only printed and the run waits for the batch",
)
FEATURES = (LOUD,)
