"""Which keys a recipe has, and the type of each: the fields of our sections, and all of TrainingArguments."""

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from qwenvl_ft.recipe.limits import Positive
from qwenvl_ft.recipe.schema import HF_LIMITS, HF_TYPES, SECTIONS

LENGTH = Positive | None
"""Type of ``global_max_length``."""


@cache
def own_types(section: str) -> dict[str, Any]:
    """Annotation of every key of a section that is ours."""
    hints = get_type_hints(SECTIONS[section], include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(SECTIONS[section]) if entry.name != "arguments"}


@cache
def argument_types() -> dict[str, Any]:
    """Annotation of every field of TrainingArguments, with our limits.

    It imports transformers, and so torch, which takes seconds: only a recipe that has such a key pays for it.
    """
    from qwenvl_ft.upstream.arguments import field_types

    found = field_types()
    hints = found | HF_TYPES
    return {name: Annotated[hints[name], HF_LIMITS[name]] if name in HF_LIMITS else hints[name] for name in found}


def type_of(key: str) -> Any:
    """Annotation of a dotted key; None where there is no such key, Any inside a mapping."""
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
    """Every key of ours as a flag of its bare name -> dotted key; of two sections' keys the first section's."""
    told: dict[str, str] = {"global_max_length": "global_max_length"}
    for section in SECTIONS:
        if section not in ("deepspeed", "evaluation"):  # enabled, data, limit: their bare names say too little
            for name in own_types(section):
                told.setdefault(name, f"{section}.{name}")
    return told
