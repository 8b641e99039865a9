"""Defines `Feature`: a use of another library's internals, a test for whether the installed versions support it, and
the fallback if they do not.

A feature is detected by the interface that it was tested with (a method, its parameters, a function), never by version
number. If the interface is missing, a fallback on public API runs and one log line says so; without a fallback, the
feature is refused.
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
    """A feature that relies on another library's internals."""

    name: str
    """A noun phrase for messages, as in "NAME does not work with peft 0.18.0"."""
    packages: tuple[str, ...] = ("transformers",)
    """The libraries that it depends on; empty for the standard library."""
    missing: Callable[[], str]
    """Returns why the installed versions do not support it, in the form ``has no NAME``; empty if they do."""
    instead: str = ""
    """The fallback and its cost; empty if there is none."""

    def line(self) -> str:
        """Return the line that a run logs if the feature is missing; empty if it is supported."""
        reason = self.missing()
        if not reason:
            return ""
        versions = f"{installed(self.packages)} " if self.packages else ""
        return f"{self.name}: {versions}{reason}; {self.instead or 'it is refused'}"

    def require(self, key: str) -> None:
        """Raise RecipeError in one line if the feature is missing.

        Args:
            key: the recipe key that needs it, such as ``training.torch_compile=true``.
        """
        if reason := self.missing():
            raise RecipeError(
                f"{key}: {self.name} does not work with {installed(self.packages)}, which {reason}. "
                "Remove the key, or install a version that docs/compatibility.md lists."
            )


def features() -> tuple[Feature, ...]:
    """Return the features that a run of any model may use; imports the libraries whose internals they use.

    A feature of one model family is required where such a model is loaded, so that no other run imports the family.
    """
    from qwenvl_ft.upstream import (
        attention,
        expert_layout,
        layers,
        media,
        processors,
        templates,
        trainer,
        vision_tables,
        workers,
    )

    modules = attention, expert_layout, layers, media, processors, templates, trainer, vision_tables, workers
    return tuple(feature for module in modules for feature in module.FEATURES)


def fallbacks() -> list[str]:
    """Return one line for each feature that the installed versions lack."""
    return [line for feature in features() if (line := feature.line())]


def installed(packages: Iterable[str]) -> str:
    """Return names and versions, such as ``transformers 5.24.0 and torch 2.15.0``."""
    return " and ".join(f"{name} {_version(name)}" for name in packages)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def lacks(owner: Any, attributes: Iterable[str]) -> str:
    """Return ``has no NAME`` for the first attribute that an object lacks; empty if it has all.

    Args:
        owner: an object, or the full name of a module to import.
    """
    where = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
    if isinstance(owner, str):
        try:
            owner = importlib.import_module(owner)
        except ImportError:
            return f"has no {where}"
    return next((f"has no {where}.{name}" for name in attributes if not hasattr(owner, name)), "")


def takes(function: Callable[..., Any], *arguments: str) -> str:
    """Return the reason why a function cannot be called with exactly these keyword arguments; empty if it can."""
    parameters = inspect.signature(function).parameters
    name = getattr(function, "__qualname__", str(function))
    open_ended = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    unknown = [argument for argument in arguments if argument not in parameters and not open_ended]
    if unknown:
        return f"has a {name} without {unknown[0]!r}"
    needed = [
        entry.name
        for entry in parameters.values()
        if entry.default is entry.empty
        and entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)
        and entry.name not in (*arguments, "self")
    ]
    return f"has a {name} that needs {needed[0]!r}" if needed else ""


def first(*reasons: str) -> str:
    """Return the first reason that is not empty."""
    return next(filter(None, reasons), "")
