"""Summaries: one line about an image, built from its objects, or given by the file and checked.

``switch/vendorA/fully visible×2，label/readable×1，备注:dust on the lens``: each kind of object with its number, in the
order of first appearance, then all remarks.
"""

# ruff: noqa: RUF001, RUF002 - Chinese punctuation

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qwenvl_ft.errors import DataError

JOINT = "，"
REMARK = "备注:"
_REMARK = re.compile(r"(?:^|/)\s*备注\s*[:：](.*)", re.DOTALL)
_LEVELS = re.compile(r"[,，/]")

LABELS = {"label": ("readable", "unreadable"), "标签": ("可识别", "无法识别")}
"""Class of labels -> the two words that replace a label's text in a summary: (readable, unreadable)."""
UNREADABLE = ("unreadable", "not readable", "illegible", "不可读", "无法识别", "不可识别", "无法辨认")
"""Attributes of a label whose text cannot be read."""

FORBIDDEN = {
    "a line break": re.compile(r"[\r\n]"),
    "a special token": re.compile(r"<\|[^|<>]*\|>|<image>|<video>|<audio>"),
    "coordinates": re.compile(
        r"[\[(]\s*-?\d+(?:\.\d+)?(?:\s*[,，]\s*-?\d+(?:\.\d+)?)+\s*[\])]|\b(?:bbox_2d|line_points)\b|[\"'](?:quad|line)[\"']\s*:"
    ),
    "a verdict on the group": re.compile(
        r"\bverdict\b\s*[:：]|(?:结论|判定|审核结果)\s*[:：]|审核(?:不|未)?通过", re.I
    ),
}
"""Name -> pattern of content that a summary must not have: it is one line of words about one image."""


def build_summary(objects: Iterable[Mapping[str, Any]]) -> str:
    """Build the summary of objects from their ``desc``; empty if there are no objects.

    Commas become slashes, a label's text is replaced by whether it can be read, equal texts are counted, and each
    remark is written once, at the end.

    Example:
        ``a/b,c``, ``label/X7``, ``a/b,c/备注:bent`` give ``a/b/c×2，label/readable×1，备注:bent``.
    """
    counts: Counter[str] = Counter()
    remarks: dict[str, None] = {}
    for entry in objects:
        text, remark = split_remark(entry["desc"])
        if text:
            counts[_kind(text)] += 1
        if remark:
            remarks[remark] = None
    parts = [f"{kind}×{count}" for kind, count in counts.items()]
    return JOINT.join(parts + [REMARK + "；".join(remarks)] if remarks else parts)


def split_remark(desc: str) -> tuple[str, str]:
    """Split a ``desc`` into the text before the remark, and the remark; line breaks become spaces."""
    found = _REMARK.search(desc)
    text, remark = (desc, "") if found is None else (desc[: found.start()], found[1])
    return " ".join(text.split()), " ".join(remark.split())


def _kind(text: str) -> str:
    """Return the text by which equal objects are counted."""
    levels = [level.strip() for level in _LEVELS.split(text) if level.strip()]
    if levels and levels[0] in LABELS and len(levels) > 1:
        readable, unreadable = LABELS[levels[0]]
        return f"{levels[0]}/{unreadable if any(level in UNREADABLE for level in levels[1:]) else readable}"
    return "/".join(levels) or text


def summary_fault(summary: Any) -> str:
    """Return what is wrong with a record's summary, or "" if it is valid."""
    if summary is None:
        return "there is none"
    if not isinstance(summary, str):
        return f"it is a {type(summary).__name__}, not a text"
    if not summary.strip():
        return "it is empty"
    return next((f"it holds {name}" for name, pattern in FORBIDDEN.items() if pattern.search(summary)), "")


def require_summary(summary: Any, where: object) -> str:
    """Check a summary and return it without surrounding whitespace.

    Raises:
        DataError: it is missing or malformed.
    """
    if fault := summary_fault(summary):
        raise DataError(
            f"{where}: summary={summary!r:.80}: {fault}. Write one line of words about the image, "
            "or set data.summary_ratio=0."
        )
    return summary.strip()
