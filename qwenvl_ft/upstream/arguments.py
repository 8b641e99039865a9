"""Borrowed: the names of TrainingArguments' fields, which change between versions while recipes do not.

``activation_checkpointing`` and its ``_kwargs`` are ``gradient_checkpointing`` before transformers 5.23, which keeps
the old name as an alias up to 6. ``offload`` and ``every_n_layers`` among the ``_kwargs`` are there from 5.17 on. A
recipe uses the newest name; `installed_name` says what the installed version calls it. A field that this version does
not have yet is refused with its key, as an unknown one is.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
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
"""Keys of ``activation_checkpointing_kwargs`` that transformers takes; the others are torch's."""


@cache
def field_types() -> dict[str, Any]:
    """Annotation of every field of TrainingArguments that can be set, under the newest name."""
    kind = _arguments()
    hints = get_type_hints(kind)
    found = {entry.name: hints[entry.name] for entry in fields(kind) if entry.init}
    for name, earlier in RENAMED.items():
        if name not in found and earlier in found:
            found[name] = found[earlier]
    return found


def installed_name(name: str) -> str:
    """What the installed version calls a field."""
    known = {entry.name for entry in fields(_arguments())}
    return RENAMED[name] if name in RENAMED and name not in known else name


def field_value(args: Any, name: str) -> Any:
    """A field of TrainingArguments, by its newest name."""
    return getattr(args, installed_name(name))


def recomputes(args: Any) -> bool:
    """Whether activations are computed again in the backward pass."""
    return bool(field_value(args, "activation_checkpointing"))


def is_reentrant(args: Any) -> bool:
    """Whether layers are computed again in torch's older way, which takes no gradient through keyword arguments."""
    options = field_value(args, "activation_checkpointing_kwargs") or {}
    return recomputes(args) and bool(options.get("use_reentrant"))


def require_checkpointing_options(given: dict[str, Any]) -> None:
    """Raises RecipeError if ``activation_checkpointing_kwargs`` has a key that this transformers hands on to torch."""
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, installed_name("activation_checkpointing") + "_enable")
    known = inspect.signature(enable).parameters
    for name in CHECKPOINTING_OPTIONS:
        if name in given and name not in known:
            raise RecipeError(
                f"training.activation_checkpointing_kwargs.{name}: {installed(('transformers',))} does not have it. "
                "Remove the key, or install transformers 5.17 or later."
            )


def worker_context(args: Any) -> str | None:
    """How loader workers are started; transformers 5.12 and before let the platform choose."""
    name = "dataloader_multiprocessing_context"
    return getattr(args, name) if hasattr(args, name) else None


def _arguments() -> Any:
    import qwenvl_ft.upstream.peft  # noqa: F401  # isort: skip - transformers would import all that peft does
    from transformers import TrainingArguments  # isort: skip

    return TrainingArguments


def as_installed(values: dict[str, Any]) -> dict[str, Any]:
    """Fields by their newest names -> by those of the installed version."""
    return {installed_name(name): value for name, value in values.items()}
