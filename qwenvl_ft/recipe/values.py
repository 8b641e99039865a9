"""Converts values from files and flags to the types of their keys, or raises a one-line error."""

import json
import math
import re
import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.choices import OneOf

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
STEPS = "must be a whole number of steps, or a share of all steps from 0 to below 1"
LIMITS: dict[str, Any] = {
    ">0": (lambda x: x > 0, "must be above 0"),
    ">=0": (lambda x: x >= 0, "must not be negative"),
    "between 0 and 1": (lambda x: 0 < x < 1, "must be above 0 and below 1"),
    "0..1": (lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    "0 to 1": (lambda x: 0 <= x <= 1, "must be from 0 to 1"),
    "steps or -1": (lambda x: x > 0 or x == -1, "must be above 0, or -1 for all of num_train_epochs"),
    "count or -1": (lambda x: x > 0 or x == -1, "must be above 0, or -1 for all"),
    "share or steps": (lambda x: 0 <= x < 1 or (x > 0 and x == int(x)), STEPS),
    "some steps": (lambda x: 0 < x < 1 or (x > 0 and x == int(x)), STEPS.replace("from 0", "above 0")),
}
"""Limit in an annotation -> its test, and the message for a value that fails it."""
PRODUCT = re.compile(r"\s*\d{1,9}(\s*\*\s*\d{1,9}){1,3}\s*")
"""A product of whole numbers, as areas are often written: ``1280*32*32``."""
NULLS = ("null", "~", "None")
"""Words that mean None, for keys that may be None."""
LARGEST = 2**63 - 1
"""Largest value of an int64."""
EXAMPLES = {int: "8", float: "1e-5", bool: "true"}
NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


class Mismatch(Exception):
    """The value does not have this type. In a union the next member is tried."""


class OutOfLimits(Mismatch):
    """The value has the right type but violates a limit."""

    def __init__(self, number: float, message: str) -> None:
        super().__init__(f"{message}.")
        self.number = number


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Convert a value to the type of its key.

    Overrides and flags arrive as text, and YAML 1.1 reads ``1e-5`` as text too. Text that spells a number, a boolean,
    null, a list or a mapping becomes one if the key's type asks for it, and stays text if the key's type is text.

    Args:
        where: ``file: section.key``, for the message.

    Raises:
        RecipeError: the value cannot be converted, or violates a limit.
    """
    try:
        return _convert(value, annotation)
    except Mismatch as error:
        wrong = error.number if isinstance(error, OutOfLimits) else value
        raise RecipeError(f"{where}: {shown(wrong)} {error}") from None


def shown(value: Any) -> str:
    """Return a value as it is written in a recipe, text in quotes."""
    if isinstance(value, str):
        return repr(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)


def parse_text(text: str) -> Any:
    """Parse text from the command line as YAML; text that is not valid YAML is returned as it is."""
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text
    return parsed["value"]


def _convert(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        base, limit = get_args(annotation)[:2]
        if isinstance(limit, OneOf):
            return _choice(value, limit.names())
        converted = _convert(value, base)
        allowed, message = LIMITS[limit]
        if converted is not None and not allowed(converted):
            raise OutOfLimits(converted, message)
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
    if type(None) in members and (value is None or (isinstance(value, str) and value in NULLS)):
        return None
    members = tuple(member for member in members if member is not type(None))
    if value is None:
        raise Mismatch("is not a value of this key.")
    closed = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    if closed:  # Enum | str: the names of the enum are all there is
        return _convert(value, closed[0])
    structured = [m for m in members if _base(m) is _bracketed(value)]
    failures: list[Mismatch] = []
    for member in structured or sorted(members, key=lambda m: _order(value, m)):
        try:
            return _convert(value, member)
        except Mismatch as error:
            failures.append(error)
    raise failures[0]


def _bracketed(value: Any) -> type | None:
    """Return list or dict for text in brackets, else None."""
    opening = value.lstrip()[:1] if isinstance(value, str) else ""
    return {"[": list, "{": dict}.get(opening)


def _base(member: Any) -> Any:
    return _base(get_args(member)[0]) if get_origin(member) is Annotated else get_origin(member) or member


def _order(value: Any, member: Any) -> int:
    """Sort key of a union's members: those that fit the value as it is first, text last, since anything can be text."""
    base = _base(member)
    if base is bool and str(value).lower() in ("true", "false"):
        return -1
    if type(value) is base:
        return 0
    return 2 if base is str else 1


def _choice(value: Any, known: Any) -> Any:
    text = value.value if isinstance(value, Enum) else value
    names = [str(name) for name in known]
    if text is False and "no" in names:  # YAML 1.1 reads a bare no as false
        text = "no"
    if str(text) not in names:
        raise Mismatch(f"is not one of the choices.{hint(str(text), names)}")
    return list(known)[names.index(str(text))]


def _list(value: Any, inner: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, str):
        value = _structure(value, list) if _bracketed(value) else value.replace(",", " ").split()
    if not isinstance(value, (list, tuple)):
        raise Mismatch("is not a list. Example: [a, b].")
    return [_entry(entry, inner[0]) for entry in value] if inner else list(value)


def _mapping(value: Any, inner: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(value, str) and _bracketed(value):
        value = _structure(value, dict)
    if not isinstance(value, dict):
        raise Mismatch('is not a mapping. Example: {"key": "value"}.')
    if not inner:
        return dict(value)
    return {str(key): _entry(entry, inner[1]) for key, entry in value.items()}


def _entry(value: Any, annotation: Any) -> Any:
    """Convert one entry of a list or mapping; the error shows the entry."""
    try:
        return _convert(value, annotation)
    except Mismatch as error:
        raise Mismatch(f"has an entry {shown(value)} that {error}") from None


def _structure(text: str, kind: type) -> Any:
    """Parse text as a list or mapping, in JSON or YAML."""
    parsed = parse_text(text)
    if not isinstance(parsed, kind):
        raise Mismatch(f"is not a {'list' if kind is list else 'mapping'}: its brackets or quotes do not match.")
    return parsed


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
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise Mismatch(f"is not a {getattr(kind, '__name__', kind)}, which cannot be written in a recipe.")


def _number(value: Any, kind: type) -> int | float:
    """Convert to a finite number. A whole number stays an int for a float key: 200 steps do not show as 200.0."""
    wrong = Mismatch(f"is not {NAMES[kind]}. Example: {EXAMPLES[kind]}.")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    if isinstance(value, str) and PRODUCT.fullmatch(value):
        value = math.prod(map(int, value.split("*")))
    try:
        number = int(value) if isinstance(value, (int, str)) else value
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            raise wrong from None
    if isinstance(number, float) and not math.isfinite(number):
        raise Mismatch("is not a finite number.")
    if abs(number) > LARGEST and (kind is int or isinstance(number, int)):
        raise Mismatch(f"is too large. The largest is {LARGEST}.")
    if kind is float:
        return number
    if number != int(number):
        raise wrong
    return int(number)
