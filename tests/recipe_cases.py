"""Reads a key of a loaded recipe, and makes up values of a key's type, for tests."""

import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qwenvl_ft.recipe.choices import OneOf
from qwenvl_ft.recipe.read_if import READ_IF


def value_of(recipe, key):
    section, _, name = key.partition(".")
    values = getattr(recipe, section)
    return values.arguments[name] if section == "training" and name in values.arguments else getattr(values, name)


def sample(kind: Any, other_than: Any) -> Any:
    """Return a value of a type other than a given one."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, limit = get_args(kind)[:2]
        if isinstance(limit, OneOf):
            return next(name for name in limit.names() if name != other_than)
        return 0.5 if limit in ("0..1", "0 to 1", "between 0 and 1") else sample(base, other_than)
    if origin in (Union, types.UnionType):
        return sample(next(member for member in get_args(kind) if member is not type(None)), other_than)
    if origin is Literal:
        return next(choice for choice in get_args(kind) if choice != other_than)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(member.value for member in kind if member.value != other_than)
    if origin in (list, tuple) or kind is list:
        return ["x"]
    if origin is dict or kind is dict:
        return {"a": 1}
    return {bool: other_than is not True, int: 3, float: 0.25}.get(kind, "x")


def is_read(recipe, key):
    """Return True if all conditions of a key in the table of what a run reads hold."""
    return all(entry.when(recipe) for entry in READ_IF if key in entry.keys)
