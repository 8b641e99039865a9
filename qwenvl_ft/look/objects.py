"""Finds the objects that an answer lists, at any depth of its JSON."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qwenvl_ft.evaluation.localization import KINDS, LocatedObject, read_object
from qwenvl_ft.evaluation.parse import BOX_KEYS, LABEL_KEYS, clean, load_json, parse_instances

KEYS = {key: kind for kind, (key, _, _) in KINDS.items()}
"""Geometry key -> kind of object."""


@dataclass(frozen=True, slots=True)
class AnswerObject:
    """An object of an answer."""

    group: str
    """Key of its image; ``""`` if the answer does not name one."""
    found: LocatedObject | None
    """None if its geometry cannot be read."""
    value: Any
    """The parsed JSON of the object."""


def named_objects(text: str) -> list[AnswerObject]:
    """Return all objects with a geometry in ``{image: {object: {...}}}``, in a list of objects, or a single object."""
    value = load_json(clean(text))
    if not isinstance(value, dict) or _is_object(value):
        return list(_walk(value, ""))
    return [
        named
        for key, inner in value.items()
        for named in _walk(inner, "" if _is_object(inner) or key in BOX_KEYS else str(key))
    ]


def all_objects(text: str) -> list[AnswerObject]:
    """Return `named_objects`; if there are none, boxes written in any other form."""
    named = named_objects(text)
    if named or "[" not in text:
        return named
    boxes = parse_instances(text) or {}
    values = [({"desc": name, "bbox_2d": list(box)}) for name, found in boxes.items() for box in found]
    return [AnswerObject("", read_object(value), value) for value in values]


def _walk(value: Any, group: str) -> Iterator[AnswerObject]:
    if _is_object(value):
        found = read_object(value)
        if found is not None and not found.desc:
            label = next((str(value[key]) for key in LABEL_KEYS if isinstance(value.get(key), (str, int))), "")
            found = replace(found, desc=label)
        yield AnswerObject(group, found, value)
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _walk(inner, group)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in KEYS)
