"""Prompts of dense captions: built-in ones of two schemes for two modes, and custom ones from a text or a file.

Scheme A explains the format only. Scheme B adds how to order, describe and outline objects.
"""

# ruff: noqa: RUF001 - Chinese punctuation

from dataclasses import dataclass
from pathlib import Path
from string import Template

from qwenvl_ft.errors import RecipeError

DENSE, SUMMARY = MODES = ("dense", "summary")
SCHEMES = ("A", "B")


@dataclass(frozen=True)
class Prompt:
    """The prompts of all groups of a mode."""

    system: str
    user: str


COORDINATES = {
    "none": "Coordinates are whole pixels, from the top left corner of the picture.",
    "norm100": "Coordinates are integers from 0 to 100: x relative to the width of the picture, y to its height.",
    "norm1000": "Coordinates are integers from 0 to 1000: x relative to the width of the picture, y to its height.",
}
"""emit_norm -> explanation of the coordinates."""

READING_ORDER = "Order the objects from top to bottom, and from left to right where their tops are level."

DENSE_FORMAT = """\
You list what pictures show. Answer with one JSON object and nothing else.
Its keys are the labels of the pictures: "$label_1", "$label_2" and so on. Under a label stand the objects of that \
picture: "$object_1", "$object_2" and so on; a picture without objects gets {}.
An object has "desc" and then one geometry:
- "bbox_2d": [x1, y1, x2, y2], the top left and the bottom right corner;
- "quad": [x1, y1, x2, y2, x3, y3, x4, y4], four corners, clockwise from the top left;
- "line_points": N and "line": [x1, y1, ..., xN, yN], the points along a line.
$coordinates"""

DENSE_HINTS = """\
$order
"desc" goes from the general to the particular: type/attribute,attribute/condition. A slash opens the next level, a \
comma parts attributes of the same level, and a remark, if there is need of one, comes last: /备注:text. Say the same \
thing in the same words every time.
Take bbox_2d for what is upright and compact, quad for what is tilted or flat, line for what is long and thin, such as \
a cable. Follow the outline of what can be seen. List each object once, and nothing that cannot be seen."""

SUMMARY_FORMAT = """\
You sum up what pictures show. Answer with one JSON object and nothing else.
Its keys are the labels of the pictures: "$label_1", "$label_2" and so on. Each value is one line of text about that \
picture, without coordinates."""

SUMMARY_HINTS = """\
Write each kind of object once, as type/attribute/attribute×number, and part kinds by ，.
Of a label say only whether it can be read: label/readable or label/unreadable.
Remarks stand once, at the end: 备注:text. Judge no picture by another, and give no verdict on all of them."""

BUILT_IN = {
    ("A", DENSE): Prompt(DENSE_FORMAT, "List every object in each picture."),
    ("B", DENSE): Prompt(
        f"{DENSE_FORMAT}\n{DENSE_HINTS}",
        "List every object in each picture: what it is, its condition, and where it is.",
    ),
    ("A", SUMMARY): Prompt(SUMMARY_FORMAT, "Sum up each picture in one line."),
    ("B", SUMMARY): Prompt(
        f"{SUMMARY_FORMAT}\n{SUMMARY_HINTS}",
        "Sum up each picture in one line: the kinds of objects, their condition, and how many there are.",
    ),
}
"""(scheme, mode) -> templates; `built_in_prompt` fills in labels, order and the explanation of coordinates."""


def built_in_prompt(
    scheme: str, mode: str, *, emit_norm: str, label_pattern: str, object_pattern: str, reading_order: bool
) -> Prompt:
    """Return the built-in prompt of a scheme and mode."""
    names = {
        f"{kind}_{number}": pattern.replace("{i}", str(number))
        for kind, pattern in (("label", label_pattern), ("object", object_pattern))
        for number in (1, 2)
    }
    names |= {"coordinates": COORDINATES[emit_norm], "order": READING_ORDER if reading_order else ""}
    prompt = BUILT_IN[scheme, mode]
    lines = Template(prompt.system).substitute(names).splitlines()
    return Prompt("\n".join(line for line in lines if line), prompt.user)


def read_prompt(text: str | None, key: str) -> str | None:
    """Return a prompt of the recipe; a single line that ends in .txt is the path of a file with the prompt.

    Args:
        key: key in the recipe, for messages.

    Raises:
        RecipeError: the file cannot be read, or the prompt is empty.
    """
    if text is None:
        return None
    if text.rstrip().endswith(".txt") and "\n" not in text.strip():
        path = Path(text.strip()).expanduser()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{key}={str(path)!r} cannot be read: {reason}. Give a UTF-8 file, or the text."
            ) from None
    if not text.strip():
        raise RecipeError(f"{key} is empty. Write a prompt, or null for the built-in one.")
    return text.strip()
