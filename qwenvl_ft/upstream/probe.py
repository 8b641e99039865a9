"""Which of the borrowed features the installed versions have, and what runs in place of those that they lack.

A feature asks for the shape that it was proven on (a method, its parameters, a function), never for a version's number.
Where the shape is missing, the plain public path runs and one line says so; a feature without one is refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qwenvl_ft.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A borrowed feature."""

    name: str
    """What it does, for people."""
    packages: tuple[str, ...]
    """The libraries that it depends on; none of Python itself."""
    missing: Callable[[], str]
    """Why the installed versions do not have the shape that it was proven on; empty if they do."""
    instead: str
    """What runs in its place and what that costs; empty if nothing does."""

    def line(self) -> str:
        """What a run says of it; empty where it is there."""
        reason = self.missing()
        if not reason:
            return ""
        who = f"{installed(self.packages)} " if self.packages else ""
        return f"{self.name}: {who}{reason}; {self.instead or 'it is refused'}"

    def require(self, key: str) -> None:
        """Raises RecipeError in one line where it is missing.

        Args:
            key: what the user asked for, as ``training.torch_compile=true``.
        """
        if reason := self.missing():
            raise RecipeError(
                f"{key}: {self.name} does not work with {installed(self.packages)}, which {reason}. "
                "Remove the key, or install a version that docs/compatibility.md lists."
            )


def features() -> tuple[Feature, ...]:
    """All of them; imports what they are borrowed from."""
    from qwenvl_ft.upstream import attention, layers, media, processors, templates, trainer, workers

    borrowed = attention, layers, media, processors, templates, trainer, workers
    return tuple(feature for module in borrowed for feature in module.FEATURES)


def fallbacks() -> list[str]:
    """A line for each feature that the installed versions lack."""
    return [line for feature in features() if (line := feature.line())]


def installed(packages: Iterable[str]) -> str:
    """Names and versions, as ``transformers 5.24.0 and torch 2.15.0``."""
    return " and ".join(f"{name} {_version(name)}" for name in packages)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def lacks(owner: Any, attributes: Iterable[str]) -> str:
    """``has no NAME`` for the first attribute that an object lacks; empty if it has all.

    Args:
        owner: an object, or a module's full name, which is imported.
    """
    where = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
    if isinstance(owner, str):
        try:
            owner = importlib.import_module(owner)
        except ImportError:
            return f"has no {where}"
    return next((f"has no {where}.{name}" for name in attributes if not hasattr(owner, name)), "")


def takes(function: Callable[..., Any], *given: str) -> str:
    """Why a function cannot be called with exactly these arguments by name; empty if it can."""
    parameters = inspect.signature(function).parameters
    name = getattr(function, "__qualname__", str(function))
    open_ended = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    strange = [argument for argument in given if argument not in parameters and not open_ended]
    if strange:
        return f"has a {name} without {strange[0]!r}"
    needed = [
        entry.name
        for entry in parameters.values()
        if entry.default is entry.empty
        and entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)
        and entry.name not in (*given, "self")
    ]
    return f"has a {name} that needs {needed[0]!r}" if needed else ""


def first(*reasons: str) -> str:
    """The first reason that is not empty."""
    return next(filter(None, reasons), "")
