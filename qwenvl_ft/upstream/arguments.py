"""Translates the names of TrainingArguments' fields, which change between versions of transformers, unlike recipes.

Relies on the names and their changes: ``activation_checkpointing`` and ``activation_checkpointing_kwargs`` are called
``gradient_checkpointing...`` before transformers 5.23, which keeps the old names as aliases until 6. The keys
``offload`` and ``every_n_layers`` of the ``_kwargs`` exist since 5.17. Recipes use the newest name, and
`installed_name` translates it to the installed version's. A field that the installed version lacks is an error that
names its key, like an unknown field.
"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import installed

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Field -> its name in earlier versions."""
CHECKPOINTING_OPTIONS = "every_n_layers", "offload"
"""Keys of ``activation_checkpointing_kwargs`` that transformers handles; it passes all others to torch."""


@cache
def field_types() -> dict[str, Any]:
    """Return the type annotation of every field of TrainingArguments that can be set, by its newest name."""
    kind = _arguments()
    hints = get_type_hints(kind)
    found = {entry.name: hints[entry.name] for entry in fields(kind) if entry.init}
    for name, earlier in RENAMED.items():
        if name not in found and earlier in found:
            found[name] = found[earlier]
    return found


@cache
def default_value(name: str) -> Any:
    """Return the default of a field of TrainingArguments, by its newest name; None if it has none."""
    entry = next(entry for entry in fields(_arguments()) if entry.name == installed_name(name))
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return None if entry.default is MISSING else entry.default


def installed_name(name: str) -> str:
    """Return the installed version's name of a field."""
    known = {entry.name for entry in fields(_arguments())}
    return RENAMED[name] if name in RENAMED and name not in known else name


def field_value(args: Any, name: str) -> Any:
    """Return a field of TrainingArguments, by its newest name."""
    return getattr(args, installed_name(name))


def recomputes(args: Any) -> bool:
    """Return True if activation checkpointing is on."""
    return bool(field_value(args, "activation_checkpointing"))


def is_reentrant(args: Any) -> bool:
    """Return True if checkpointing uses torch's reentrant form, which gives keyword arguments no gradient.

    It is torch's default, up to 2.15, for options that do not say it; transformers' default without options is not.
    """
    given = field_value(args, "activation_checkpointing_kwargs") or {}
    options = {name: value for name, value in given.items() if name not in CHECKPOINTING_OPTIONS}
    return recomputes(args) and bool(options) and options.get("use_reentrant") is not False


def require_checkpointing_options(options: dict[str, Any]) -> None:
    """Raise RecipeError if ``activation_checkpointing_kwargs`` has a key that is too new for this transformers.

    It would pass the key to torch.
    """
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, installed_name("activation_checkpointing") + "_enable")
    known = inspect.signature(enable).parameters
    for name in CHECKPOINTING_OPTIONS:
        if name in options and name not in known:
            raise RecipeError(
                f"training.activation_checkpointing_kwargs.{name}: {installed(('transformers',))} does not have it. "
                "Remove the key, or install transformers 5.17 or later."
            )


def worker_context(args: Any) -> str | None:
    """Return the start method of dataloader workers; None up to transformers 5.12, which uses Python's default."""
    name = "dataloader_multiprocessing_context"
    return getattr(args, name) if hasattr(args, name) else None


def _arguments() -> Any:
    import qwenvl_ft.upstream.peft  # noqa: F401  # isort: skip - else transformers imports peft with bitsandbytes
    from transformers import TrainingArguments  # isort: skip

    return TrainingArguments


def as_installed(values: dict[str, Any]) -> dict[str, Any]:
    """Rename fields from their newest names to the installed version's."""
    return {installed_name(name): value for name, value in values.items()}
