"""What can go wrong because of the user's input, and how it is said: one line that names the fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class QwenVLError(Exception):
    """A fault in what the user gave us. Command line tools print it as one line and exit with 2."""


class RecipeError(QwenVLError, ValueError):
    """A recipe, an override or a flag is wrong."""


class DataError(QwenVLError, ValueError):
    """A data set, a record or a medium is wrong."""


class CheckpointError(QwenVLError, ValueError):
    """A model, adapter or training checkpoint cannot be used."""


def hint(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'? Known: x, y.`` with the first sentence only where something is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Known: {', '.join(known) or '(none)'}."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RecipeError:
    """The error for a name that does not exist: what was given, what was meant, what there is."""
    return RecipeError(f"unknown {kind} {name!r}.{hint(name, known)}")


class TrainingError(QwenVLError):
    """Training cannot go on: a loss or a gradient is not finite."""
