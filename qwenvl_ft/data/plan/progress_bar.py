"""How far a pass over all records is: a bar on a terminal, a line now and then in a log."""

from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""Between two lines, where stderr is no terminal."""

Chunk = TypeVar("Chunk", bound=Sized)


def with_progress(
    chunks: Iterable[Chunk], total: int, told: str, *, quiet: bool = False, line_seconds: float = LINE_SECONDS
) -> Iterator[Chunk]:
    """The chunks as they are, on stderr how many entries of ``total`` they had.

    Args:
        told: what is counted.
        line_seconds: what is shorter leaves no line in a log.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield from chunks if quiet else _with_lines(chunks, total, told, console, line_seconds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(told, total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))


def _with_lines(
    chunks: Iterable[Chunk], total: int, told: str, console: Console, line_seconds: float
) -> Iterator[Chunk]:
    begin = said = monotonic()
    count = 0
    for chunk in chunks:
        yield chunk
        count += len(chunk)
        now = monotonic()
        if now - said >= line_seconds and count < total:
            said = now
            left = (now - begin) / count * (total - count)
            console.print(f"{told}: {count:,} of {total:,}, {left:,.0f} s left", highlight=False)
