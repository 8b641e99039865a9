"""Every record once: one function over all of them, in several processes, in order, with a progress bar."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

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
        told: what stands before the progress bar, on stderr, where that is a terminal.
        quiet: no progress bar.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the tokenizer warns of the fork
    looked = _Looked(records, look)
    workers = num_proc if num_proc > 1 and len(looked) >= PARALLEL_FROM else 0
    chunks: Any = DataLoader(looked, batch_size=CHUNK, num_workers=workers, collate_fn=list)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(told, total=len(looked))
        for chunk in chunks:
            yield from chunk
            bar.advance(task, len(chunk))
