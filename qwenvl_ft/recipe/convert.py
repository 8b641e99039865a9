"""A value from a file or a flag -> the type its field has, or one line that says what is wrong with it."""

import json
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qwenvl_ft.errors import RecipeError, hint

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LIMITS: dict[str, Any] = {
    ">0": (lambda x: x > 0, "must be above 0"),
    ">=0": (lambda x: x >= 0, "must not be negative"),
    "0..1": (lambda x: 0 <= x <= 1, "must be between 0 and 1"),
}
EXAMPLES = {int: "8", float: "1e-5", bool: "true"}
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
    list: "a list",
}


class Mismatch(Exception):
    """The value has not this type; tried next is another member of a union."""


def convert(value: Any, annotation: Any, where: str) -> Any:
    """The value in its field's type.

    YAML 1.1 reads ``1e-5`` as text and flags are all text, so a text that spells a number, a truth value or a JSON
    mapping is taken as one where the field wants that.

    Args:
        where: ``file: section.key``, for the message.

    Raises:
        RecipeError: it cannot be that type, or is outside its limits.
    """
    try:
        return _convert(value, annotation)
    except Mismatch as error:
        raise RecipeError(f"{where}: {value!r} {error}") from None


def _convert(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        base, limit = get_args(annotation)[:2]
        converted = _convert(value, base)
        allowed, told = LIMITS[limit]
        if not allowed(converted):
            raise Mismatch(f"{told}.")
        return converted
    if origin in (Union, types.UnionType):
        return _union(value, get_args(annotation))
    if origin is Literal:
        return _choice(value, get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _choice(value, [member.value for member in annotation])
    if origin in (list, tuple) or annotation is list:
        return _list(value, get_args(annotation))
    if origin is dict or annotation is dict:
        return _mapping(value, get_args(annotation))
    return _scalar(value, annotation)


def _union(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    closed = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    if closed:  # Enum | str: the names of the enum are all there is
        return _convert(value, closed[0])
    failures: list[Mismatch] = []
    for member in sorted(members, key=lambda m: _order(value, m)):
        try:
            return _convert(value, member)
        except Mismatch as error:
            failures.append(error)
    raise failures[0]


def _order(value: Any, member: Any) -> int:
    """Members that fit the value as it is first; text last, because everything can be text."""
    base = get_origin(member) or member
    if base is Annotated:
        base = get_args(member)[0]
    if isinstance(base, type) and type(value) is base:
        return 0
    return 2 if base is str else 1


def _choice(value: Any, known: Any) -> Any:
    text = value.value if isinstance(value, Enum) else value
    names = [str(name) for name in known]
    if text is False and "no" in names:  # YAML 1.1 reads a bare no as false
        text = "no"
    if str(text) not in names:
        raise Mismatch(f"is not a choice here.{hint(str(text), names)}")
    return list(known)[names.index(str(text))]


def _list(value: Any, inner: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, str):
        value = _json(value) if value.lstrip().startswith("[") else value.replace(",", " ").split()
    if not isinstance(value, (list, tuple)):
        raise Mismatch("is not a list.")
    return [_convert(entry, inner[0]) for entry in value] if inner else list(value)


def _mapping(value: Any, inner: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _json(value)
    if not isinstance(value, dict):
        raise Mismatch('is not a mapping. Example: \'{"key": "value"}\'.')
    if not inner:
        return dict(value)
    return {str(key): _convert(entry, inner[1]) for key, entry in value.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Mismatch(f"is not valid JSON ({error}).") from None


def _scalar(value: Any, kind: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if kind is bool:
        word = WORDS.get(str(value).lower()) if not isinstance(value, float) else None
        if word is None:
            raise Mismatch("is not true or false.")
        return word
    if kind is str:
        if isinstance(value, (dict, list)) or value is None:
            raise Mismatch("is not a text.")
        return value if isinstance(value, str) else json.dumps(value)
    if kind in (int, float):
        return _number(value, kind)
    if typing.get_origin(kind) is None and isinstance(kind, type) and isinstance(value, kind):
        return value
    raise Mismatch(f"is not {getattr(kind, '__name__', kind)}.")


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Mismatch(f"is not {NAMES[kind]}. Example: {EXAMPLES[kind]}.")
    try:
        number = float(value)
    except ValueError:
        raise Mismatch(f"is not {NAMES[kind]}. Example: {EXAMPLES[kind]}.") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise Mismatch("is not a finite number.")
    if kind is float:
        return number
    if number != int(number):
        raise Mismatch(f"is not a whole number. Example: {EXAMPLES[int]}.")
    return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
