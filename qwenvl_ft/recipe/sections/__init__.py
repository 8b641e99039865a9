"""The sections of a recipe: one dataclass each, with its defaults, and the help text under every field.

A large section inherits its fields from one dataclass per topic. In a recipe file all keys of a section are flat.
"""

from dataclasses import is_dataclass
from inspect import get_annotations


def topics(section: type) -> list[type]:
    """Return the dataclasses that define a section's fields: the section itself, then its topics in order."""
    return [kind for kind in section.__mro__ if is_dataclass(kind) and get_annotations(kind)]


def field_names(section: type) -> list[str]:
    """Return the names of a section's fields, topic by topic. (`dataclasses.fields` has the last topic first.)"""
    return [name for kind in topics(section) for name in get_annotations(kind)]
