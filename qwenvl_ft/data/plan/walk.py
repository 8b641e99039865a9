"""Calls one function on every record: in order, in several processes if that pays off, with a progress bar."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from qwenvl_ft.data.plan.progress_bar import with_progress

CHUNK = 32
"""Records that a worker handles before it returns their results."""
PARALLEL_FROM = 128
"""Number of records from which starting workers pays off."""

Result = TypeVar("Result")


class _Results(Dataset[Result], Generic[Result]):
    """``function(records, index)`` as a data set, so that a `DataLoader` spreads the work."""

    def __init__(self, records: Any, function: Callable[[Any, int], Result]) -> None:
        self.records = records
        self.function = function

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Result:
        return self.function(self.records, index)


def walk(
    records: Any,
    function: Callable[[Any, int], Result],
    *,
    num_proc: int = 1,
    label: str = "",
    quiet: bool = False,
    chunk: int = CHUNK,
    parallel_from: int = PARALLEL_FROM,
) -> Iterator[Result]:
    """Yield ``function(records, 0)``, ``function(records, 1)``, ... in that order.

    Args:
        function: must pickle, as must its results.
        num_proc: worker processes; 1 does the work in this process.
        label: text before the progress, on stderr.
        quiet: show no progress.
        chunk: records that a worker handles before it returns their results.
        parallel_from: with fewer records, no worker is started.
    """
    results = _Results(records, function)
    chunks: Iterable[list[Result]]
    if num_proc > 1 and len(results) >= parallel_from:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the tokenizer warns of the fork
        # Without a generator of its own, the loader would draw its seed from the global one, which training uses.
        chunks = DataLoader(
            results, batch_size=chunk, num_workers=num_proc, collate_fn=list, generator=torch.Generator()
        )
    else:
        chunks = ([results[index]] for index in range(len(results)))
    for entries in with_progress(chunks, len(results), label, quiet=quiet):
        yield from entries
