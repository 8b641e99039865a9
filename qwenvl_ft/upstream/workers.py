"""Ends dataloader workers: at once where a batch cannot be pickled, and with the training that they were started for.

A lost batch: relies on ``multiprocessing.queues.Queue._on_queue_feeder_error(error, item)``, a static method that the
standard library has for `concurrent.futures` to override, Python 3.7 to 3.14. It runs in the queue's feeder thread. By
default it prints the error, and the queue continues without the item. There is no public way to catch the error,
because the queue pickles items later, in that thread.

If it is missing, the error about a lost batch is only printed, and the run waits for the batch (`LOUD`).

Persistent workers: relies on ``torch.utils.data.DataLoader._iterator``, which holds them, torch 1.7 to 2.15. torch has
no public way to end them. If they are left to the garbage collector, it clears the queue by which they are asked to end
before it asks them, so that each loader waits five seconds for its workers (`PROMPT`).
"""

from __future__ import annotations

import inspect
import multiprocessing.queues
import os
import traceback
from functools import cache
from typing import Any, cast

from torch.utils.data import DataLoader

from qwenvl_ft.upstream.probe import Feature, lacks

HOOK = "_on_queue_feeder_error"
ITERATOR = "_iterator"
STDERR = 2
"""File descriptor of the standard error stream."""


def end_with_lost_items() -> None:
    """Make this process exit, from now on, when an item cannot be put in a queue."""
    if not LOUD.missing():
        setattr(multiprocessing.queues.Queue, HOOK, staticmethod(_end))


def end_workers(loader: DataLoader[Any]) -> None:
    """End the persistent workers of a loader; iterating over it starts new ones."""
    if not PROMPT.missing():
        setattr(loader, ITERATOR, None)


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
PROMPT = Feature(
    name="persistent dataloader workers that end with the training",
    packages=("torch",),
    missing=lambda: lacks(DataLoader(cast(Any, [0])), (ITERATOR,)),
    instead="they are left to the garbage collector, which takes five seconds",
)
FEATURES = (LOUD, PROMPT)
