"""Parses answers in free text: a letter, a class, labels, a number, boxes.

Each function returns None if the answer cannot be parsed, so that the caller can count it; nothing is guessed.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 with x1 <= x2 and y1 <= y2."""

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
GAP = r"(?:\s*,\s*|\s+)"
FOUR = GAP.join([f"({NUMBER})"] * 4)
TWO = rf"[\[(]\s*({NUMBER}){GAP}({NUMBER})\s*[\])]"
BOX = re.compile(rf"[\[(]\s*{FOUR}\s*,?\s*[\])]")
CORNERS = re.compile(rf"{TWO}\s*,?\s*{TWO}")
"""Two points instead of four numbers."""
BARE = re.compile(rf"^\s*{FOUR}\s*[;,.]?\s*$", re.MULTILINE)
"""A line of four numbers without brackets."""
KEY = re.compile(r"[\"']?(?P<key>\w(?:[\w .+/-]{0,40}\w)?)[\"']?\s*:")
PREFIX = re.compile(r"^(?:chromosome|chr|instance|object|id)[\s_.#]*(?=\w)")
"""Prefix that is removed from an id."""
BOX_KEYS = ("bbox_2d", "bbox", "bboxes", "box", "boxes", "box_2d", "coordinates", "detections", "objects")
LABEL_KEYS = ("label", "id", "name", "class", "category", "type")
CORNER_KEYS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"))
NOTHING = re.compile(r"(?:none|nothing|n/a|no|no [^\d]*|\[[\s\[\]]*\]|\{\s*\})\.?", re.IGNORECASE)
"""An answer that says there is no box."""

ANSWER = re.compile(r"(?:(?i:answer|choice|option)(?i:\s+is|\s*[:=])*|\\boxed)[\s*_({\[\"'`]*([A-Z])(?![A-Za-z'])")
LEADING = re.compile(r"^\W*([A-Z])\s*(?:[.):;*\n–-]|$)")  # noqa: RUF001 - answers have en dashes
SEVERAL = re.compile(r"^\W*[A-Z]\W*(?:(?:or|and)\W+)?[A-Z](?![A-Za-z])")
ALONE = re.compile(r"(?<![A-Za-z0-9'])(?!A [a-z])([A-HJ-Z])(?![A-Za-z0-9'])")
"""A single capital letter that is neither the article nor the pronoun."""
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.MULTILINE)


LARGEST = 1e12
"""Upper limit of counts and measurements; a model that repeats a digit endlessly has not answered."""


def clean(text: str) -> str:
    """Remove reasoning, code fences and special tokens from an answer, and strip it."""
    text = text.rpartition("</think>")[2]
    text = re.sub(r"<\|[^|<>]*\|>", "", text)
    return re.sub(r"^\s*```\w*\s*$|```(?:json|JSON)?", "", text, flags=re.MULTILINE).strip()


def parse_letter(text: str) -> str | None:
    """Return the letter of a choice, in upper case.

    Example:
        ``B``, ``(b)``, ``B. Benign``, ``**B**``, ``The answer is B.`` and ``\\boxed{B}`` are ``"B"``; ``B or C`` is
        None. If an answer is announced several times, the last one counts.
    """
    text = clean(text)
    bare = text.strip(" \t\r\n.,:;!*_()[]{}\"'`")
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper()
    announced = ANSWER.findall(text)
    if announced:
        return announced[-1]
    leading = LEADING.match(text)
    if leading:
        return None if SEVERAL.match(text) else leading[1]
    alone = set(ALONE.findall(text))
    return alone.pop() if len(alone) == 1 else None


def parse_class(text: str, classes: Iterable[str]) -> str | None:
    """Return which of ``classes`` (in `plain` form) an answer names.

    The name may be part of a sentence. Among names that contain each other the longest counts; an answer with two
    different names gives None.
    """
    answer = plain(text)
    known = set(classes)
    if answer in known:
        return answer
    found = [name for name in known if name and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", answer)]
    longest = [name for name in found if not any(name != other and name in other for other in found)]
    return longest[0] if len(longest) == 1 else None


def plain(text: str) -> str:
    """Normalise a name for comparison: fold case, collapse white space, remove quotes and full stops at the ends."""
    return " ".join(clean(text).casefold().split()).strip(" .\"'`*")


def parse_labels(text: str, known: Iterable[str] = ()) -> frozenset[str]:
    """Return the labels of a list in `plain` form: split at ``;``, or at ``,`` if there is none, never at white space.

    Bullets and a JSON list of strings work too.

    Args:
        known: labels that contain a comma and are not split.
    """
    text = clean(text)
    listed = load_json(text) if text.startswith("[") else None
    if isinstance(listed, list) and all(isinstance(label, str) for label in listed):
        pieces = listed
    elif BULLET.search(text):
        pieces = [line for line in BULLET.split(text) if line.strip()]
    elif ";" in text:
        pieces = text.split(";")
    else:
        pieces = [text] if plain(text) in set(known) else text.split(",")
    return frozenset(label for label in map(plain, pieces) if label)


def parse_number(text: str) -> float | None:
    """Return the first number: ``about 1,250 cells`` is 1250, ``22.9 %`` is 22.9."""
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda found: found[0].replace(",", ""), clean(text))
    found = re.search(rf"(?<![A-Za-z\d.]){NUMBER}", text)
    number = float(found[0]) if found else math.inf
    return number if abs(number) < LARGEST else None


def parse_boxes(text: str) -> list[Box] | None:
    """Return all boxes of an answer, in any form that `parse_instances` reads."""
    found = parse_instances(text)
    return None if found is None else [box for boxes in found.values() for box in boxes]


def parse_instances(text: str) -> dict[str, list[Box]] | None:
    """Return id -> boxes of an answer; boxes without an id are under ``""``.

    Accepts ``[x1, y1, x2, y2]`` alone, in a list, on lines or between ``;``; a JSON or Python mapping of ids to boxes;
    objects with ``bbox_2d`` and ``label``; two points ``(x1, y1), (x2, y2)``. All of these may be within other text,
    fenced, or truncated. ``[]`` and ``None`` are valid answers without boxes.

    Example:
        ``{"1": [[0, 0, 5, 9], [6, 0, 9, 9]], "X": [1, 2, 3, 4]}`` has two boxes of ``"1"`` and one of ``"x"``.
    """
    text = clean(text)
    ways = [_grouped(_walk(load_json(text), "")), _grouped(_scan(text))]
    found = max(ways, key=lambda way: (sum(map(len, way.values())), sum(len(way[name]) for name in way if name)))
    return found if found or NOTHING.fullmatch(text) else None


def map_boxes(text: str, scale: Callable[[Box], Iterable[float]]) -> str:
    """Replace the numbers of each ``[x1, y1, x2, y2]`` in an answer by the result of ``scale``."""

    def replaced(found: re.Match[str]) -> str:
        scaled = scale(_box(found.groups()))
        return "[" + ", ".join(f"{value:.10g}" for value in scaled) + "]"

    return BOX.sub(replaced, text)


def load_json(text: str) -> Any:
    """Return the first JSON list or object in a text, or None. Repairs Python quotes and a truncated end."""
    starts = [found.start() for found in re.finditer(r"[\[{]", text)]
    for start in starts[:8]:  # later ones are only members of something that cannot be parsed
        for mend, load in MENDED:
            try:
                return load(mend(text[start:]))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return None


def close_json(text: str) -> str:
    """Repair truncated JSON: drop the last unfinished member and close the brackets.

    Example:
        ``{"a": [[1, 2], [3`` becomes ``{"a": [[1, 2]]}``.
    """
    opened: list[str] = []
    quote = ""
    whole, closing = 0, ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[place - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            opened.append("]" if char == "[" else "}")
        elif char in "]}" and opened:
            opened.pop()
            whole, closing = place + 1, "".join(reversed(opened))
            if not opened:
                break
    return text[:whole] + closing


def _decode(text: str) -> Any:
    return json.JSONDecoder().raw_decode(text)[0]


MENDED: tuple[tuple[Callable[[str], str], Callable[[str], Any]], ...] = (
    (str, _decode),
    (str, ast.literal_eval),
    (close_json, _decode),
    (close_json, ast.literal_eval),
)
"""(repair of a text, parser), in the order in which they are tried."""


def _walk(value: Any, name: str) -> Iterator[tuple[str, Box]]:
    """Yield (id, box) of each box in parsed JSON."""
    if isinstance(value, dict):
        corners = next((keys for keys in CORNER_KEYS if all(key in value for key in keys)), None)
        label = next((str(value[key]) for key in LABEL_KEYS if isinstance(value.get(key), (str, int))), name)
        if corners is not None and all(_is_number(value[key]) for key in corners):
            yield label, _box([value[key] for key in corners])
            return
        for key, inner in value.items():
            if key not in LABEL_KEYS:
                yield from _walk(inner, label if key in BOX_KEYS else str(key))
    elif isinstance(value, (list, tuple)):
        if len(value) == 4 and all(map(_is_number, value)):
            yield name, _box(value)
        elif len(value) == 2 and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value):
            numbers = [number for point in value for number in point]
            if all(map(_is_number, numbers)):
                yield name, _box(numbers)
        else:
            for inner in value:
                yield from _walk(inner, name)
    elif isinstance(value, str):
        for found in BOX.finditer(value):
            yield name, _box(found.groups())


def _scan(text: str) -> Iterator[tuple[str, Box]]:
    """Yield (id, box) of each box in a text; the id is the last ``id:`` before it."""
    form = next((pattern for pattern in (BOX, CORNERS, BARE) if pattern.search(text)), BOX)
    keys = [(found.end(), found["key"]) for found in KEY.finditer(text) if found["key"] not in BOX_KEYS + LABEL_KEYS]
    for found in form.finditer(text):
        before = [key for end, key in keys if end <= found.start()]
        yield before[-1] if before else "", _box(found.groups())


def _grouped(pairs: Iterable[tuple[str, Box]]) -> dict[str, list[Box]]:
    grouped: dict[str, list[Box]] = {}
    for name, box in pairs:
        if all(map(math.isfinite, box)):
            grouped.setdefault(PREFIX.sub("", plain(name)), []).append(box)
    return grouped


def _box(numbers: Iterable[Any]) -> Box:
    x1, y1, x2, y2 = map(float, numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
