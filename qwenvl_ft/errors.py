"""What can go wrong because of the user's input, and how it is said: one line that names the fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class QwenVLError(Exception):
    """A fault in what the user gave us. Command line tools print it as one line and exit with 2."""

    def __str__(self) -> str:
        """One line, whatever line breaks a key, a value or another library's message has."""
        return " ".join(super().__str__().split())


class RecipeError(QwenVLError, ValueError):
    """A recipe, an override or a flag is wrong."""


class DataError(QwenVLError, ValueError):
    """A data set, a record or a medium is wrong."""


class CheckpointError(QwenVLError, ValueError):
    """A model, adapter or training checkpoint cannot be used."""


def one_line(error: Warning | Exception | str, limit: int = 300) -> str:
    """Another library's message on one line, at most ``limit`` characters; the error's type if it has no message."""
    return " ".join(str(error).split())[:limit] or (error if isinstance(error, str) else type(error).__name__)


def hint(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'? Known: x, y.`` with the first sentence only where something is close.

    A name that begins with what was given comes before one that resembles it: the first such in the order of ``known``.
    """
    ordered = sorted(known) if isinstance(known, set | frozenset) else list(known)
    begun = [entry for entry in ordered if len(name) > 2 and entry.startswith(name)]
    close = begun or get_close_matches(name, sorted(ordered), n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Known: {', '.join(sorted(ordered)) or '(none)'}."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RecipeError:
    """The error for a name that does not exist: what was given, what was meant, what there is."""
    return RecipeError(f"unknown {kind} {name!r}.{hint(name, known)}")


class TrainingError(QwenVLError):
    """Training cannot go on: a loss or a gradient is not finite."""


class BenchError(QwenVLError):
    """A measurement cannot be relied on."""
