"""Shows the progress of a pass over all records: a bar on a terminal, a line every 30 seconds in a log."""

from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""Seconds between two lines, if stderr is not a terminal."""

Chunk = TypeVar("Chunk", bound=Sized)


def with_progress(
    chunks: Iterable[Chunk], total: int, label: str, *, quiet: bool = False, line_seconds: float = LINE_SECONDS
) -> Iterator[Chunk]:
    """Yield the chunks unchanged, and show on stderr how many of ``total`` entries they held so far.

    Args:
        label: text before the numbers.
        quiet: show nothing.
        line_seconds: seconds between two lines of a log; a shorter pass writes none.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield from chunks if quiet else _with_lines(chunks, total, label, console, line_seconds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))


def _with_lines(
    chunks: Iterable[Chunk], total: int, label: str, console: Console, line_seconds: float
) -> Iterator[Chunk]:
    begin = last_line = monotonic()
    count = 0
    for chunk in chunks:
        yield chunk
        count += len(chunk)
        now = monotonic()
        if now - last_line >= line_seconds and count < total:
            last_line = now
            left = (now - begin) / count * (total - count)
            console.print(f"{label}: {count:,} of {total:,}, {left:,.0f} s left", highlight=False)
