"""The keys of a recipe and their types: the fields of our sections, and those of transformers' TrainingArguments."""

from functools import cache
from typing import Annotated, Any, get_type_hints

from qwenvl_ft.recipe.limits import Positive
from qwenvl_ft.recipe.schema import HF_LIMITS, HF_TYPES, SECTIONS
from qwenvl_ft.recipe.sections import field_names

LENGTH = Positive | None
"""Type of ``global_max_length``."""


@cache
def own_types(section: str) -> dict[str, Any]:
    """Return the annotation of every key of a section that we define."""
    hints = get_type_hints(SECTIONS[section], include_extras=True)
    return {name: hints[name] for name in field_names(SECTIONS[section]) if name != "arguments"}


@cache
def argument_types() -> dict[str, Any]:
    """Return the annotation of every field of TrainingArguments, with our limits.

    Imports transformers and torch, which takes seconds. Only a recipe that has such a key pays for it.
    """
    from qwenvl_ft.upstream.arguments import field_types

    found = field_types()
    hints = found | HF_TYPES
    return {name: Annotated[hints[name], HF_LIMITS[name]] if name in HF_LIMITS else hints[name] for name in found}


def type_of(key: str) -> Any:
    """Return the annotation of a dotted key: None if there is no such key, Any inside a mapping."""
    if key == "global_max_length":
        return LENGTH
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        return None
    if "." in name:
        return Any
    if name in own_types(section):
        return own_types(section)[name]
    if section == "training" and name in argument_types():
        return argument_types()[name]
    return None


@cache
def bare_names() -> dict[str, str]:
    """Return the dotted key of every flag that is a key without its section, as ``--lora_rank``.

    If two sections have the same key, the flag sets that of the first section.
    """
    names: dict[str, str] = {"global_max_length": "global_max_length"}
    for section in SECTIONS:
        if section not in ("deepspeed", "evaluation"):  # enabled, data, limit: too vague without their section
            for name in own_types(section):
                names.setdefault(name, f"{section}.{name}")
    return names
