"""The errors that a user's input can cause. Each message is one line that says how to fix it."""

from collections.abc import Iterable
from difflib import get_close_matches

WORKER_TRACEBACK = "\nOriginal Traceback (most recent call last):\n"
"""In the message of an error that a `DataLoader` has raised again (torch 2.8 to 2.14)."""


class QwenVLError(Exception):
    """A fault in the user's input. Command line tools print it as one line and exit with code 2."""

    def __str__(self) -> str:
        """Return the message on one line, even if a key, a value or another library's message has line breaks.

        A `DataLoader` raises the error of a worker with the worker's traceback as its message; the error's own message
        is the last line of it.
        """
        text = super().__str__()
        if WORKER_TRACEBACK in text:
            last = text.rstrip().rpartition("\n")[2]
            text = last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")
        return " ".join(text.split())


class RecipeError(QwenVLError, ValueError):
    """A recipe, an override or a flag is wrong."""


class DataError(QwenVLError, ValueError):
    """A dataset, a record, an image or a video is wrong."""


class CheckpointError(QwenVLError, ValueError):
    """A model, adapter or training checkpoint cannot be used."""


def one_line(error: Warning | Exception | str, limit: int = 300) -> str:
    """Return another library's message on one line of at most ``limit`` characters; without one, the error's type."""
    return " ".join(str(error).split())[:limit] or (error if isinstance(error, str) else type(error).__name__)


def hint(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'? Known: x, y.``, without the question if no known name is similar.

    A known name that starts with ``name`` is preferred to a similar one; of several, the first in the order of
    ``known``.
    """
    ordered = sorted(known) if isinstance(known, set | frozenset) else list(known)
    extended = [entry for entry in ordered if len(name) > 2 and entry.startswith(name)]
    close = extended or get_close_matches(name, sorted(ordered), n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Known: {', '.join(sorted(ordered)) or '(none)'}."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RecipeError:
    """Return the error for a name that does not exist, with a similar name and all known ones."""
    return RecipeError(f"unknown {kind} {name!r}.{hint(name, known)}")


class TrainingError(QwenVLError):
    """Training cannot continue, because a loss or a gradient is not finite.

    Args:
        step: optimizer step, from 1, in which that is; of the errors of several ranks, the earliest counts.
    """

    def __init__(self, *arguments: object, step: int = 0) -> None:
        super().__init__(*arguments)
        self.step = step


class BenchError(QwenVLError):
    """A measurement is not reliable."""
