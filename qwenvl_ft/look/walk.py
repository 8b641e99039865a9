"""Every record once: one function over all of them, in several processes, in order, with a progress bar."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from qwenvl_ft.data.plan.progress_bar import with_progress

CHUNK = 32
"""Records that a process looks at before it answers."""
PARALLEL_FROM = 128
"""Records from which starting processes pays."""

Result = TypeVar("Result")


class _Looked(Dataset[Any]):
    """What the function says of each record, as a data set so that a `DataLoader` spreads the work."""

    def __init__(self, records: Any, look: Callable[[Any, int], Any]) -> None:
        self.records = records
        self.look = look

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.look(self.records, index)


def walk(
    records: Any, look: Callable[[Any, int], Result], *, num_proc: int = 1, told: str = "", quiet: bool = False
) -> Iterator[Result]:
    """``look(records, 0)``, ``look(records, 1)``, ... in that order.

    Args:
        look: it and its results must pickle.
        num_proc: processes that share the work.
        told: what stands before the progress, on stderr.
        quiet: no progress.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the tokenizer warns of the fork
    looked = _Looked(records, look)
    workers = num_proc if num_proc > 1 and len(looked) >= PARALLEL_FROM else 0
    generator = torch.Generator()  # or the loader draws its seed from the global one, which training goes on with
    chunks: Any = DataLoader(looked, batch_size=CHUNK, num_workers=workers, collate_fn=list, generator=generator)
    for chunk in with_progress(chunks, len(looked), told, quiet=quiet):
        yield from chunk
