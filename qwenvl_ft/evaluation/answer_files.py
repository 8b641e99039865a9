"""Reads answers and their references from .jsonl files, to score them without a model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.generate import expected_answer
from qwenvl_ft.evaluation.metrics import require_readable

ANSWER_KEYS = ("prediction", "answer", "response", "predict")
"""Keys of an answer: ours, `qwenvl-ft infer --json`'s, ms-swift's and LLaMA-Factory's."""
REFERENCE_KEYS = ("reference", "expected", "labels", "label")
"""Keys of the expected answer: ours, `evaluate`'s, ms-swift's and LLaMA-Factory's."""


@dataclass(frozen=True)
class Pairs:
    """References and answers in the same order."""

    references: list[str]
    answers: list[str]
    sizes: list[list[tuple[float, float]]] | None
    """(width, height) of the images of each line, from its key ``sizes``; None if no line has it."""


def read_answers(data: Path, answers: Path | None, metric: str) -> Pairs:
    """Read the lines of ``data``, and the answers from a file of their own if it is given.

    A line holds the answer under one of `ANSWER_KEYS` and the expected answer under one of `REFERENCE_KEYS`. A line of
    ``data`` may also be a record in any training format, whose last assistant turn is the reference; a line of
    ``answers`` may also be a string.

    Raises:
        DataError: a file or line cannot be read, a line lacks its reference or answer, the metric cannot read the
            reference, or the files differ in length.
    """
    lines = _lines(data)
    references = [_reference(value, f"{data}:{number}", data, metric) for number, value in lines]
    given = lines if answers is None else _lines(answers)
    if len(given) != len(lines):
        raise DataError(f"{answers} has {len(given)} answers, but {data} has {len(lines)} lines. Give one for each.")
    texts = [_answer(value, f"{answers or data}:{number}") for number, value in given]
    return Pairs(references, texts, _sizes(lines, data))


def _lines(path: Path) -> list[tuple[int, Any]]:
    """Return (line number, value) of all lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise DataError(f"{path}:{number} is not a line of JSON: {error}. Write one object per line.") from None
    if not values:
        raise DataError(f"{path} has no lines, so there is nothing to score.")
    return values


def _reference(value: Any, where: str, data: Path, metric: str) -> str:
    key = next((key for key in REFERENCE_KEYS if isinstance(value, dict) and isinstance(value.get(key), str)), None)
    if key is not None:
        text = value[key]
    elif isinstance(value, dict) and not value.keys() & {*ANSWER_KEYS, *REFERENCE_KEYS}:
        text = expected_answer(read_record(value, Source(str(data), where), str(data.parent)))
    else:
        raise DataError(f"{where} has no text under {', '.join(REFERENCE_KEYS)}: {str(value)[:80]}.")
    require_readable(metric, text, where)
    return text


def _answer(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    found = [value[key] for key in ANSWER_KEYS if key in value] if isinstance(value, dict) else []
    if not found or not isinstance(found[0], str):
        raise DataError(f"{where} has no text under {', '.join(ANSWER_KEYS)}: {str(value)[:80]}.")
    return found[0]


def _sizes(lines: list[tuple[int, Any]], data: Path) -> list[list[tuple[float, float]]] | None:
    """Return the sizes of the images of all lines.

    Raises:
        DataError: only some lines have them, or one is not a list of [width, height].
    """
    given = [(number, value["sizes"]) for number, value in lines if isinstance(value, dict) and "sizes" in value]
    if not given:
        return None
    if len(given) < len(lines):
        missing = next(number for number, value in lines if not isinstance(value, dict) or "sizes" not in value)
        raise DataError(f"{data}:{missing} has no 'sizes', unlike other lines. Give them in all lines, or in none.")
    sizes = []
    for number, value in given:
        try:
            sizes.append([(float(width), float(height)) for width, height in value])
        except (TypeError, ValueError):
            raise DataError(f"{data}:{number}: 'sizes' is {value!r:.80}, not [[width, height], ...].") from None
    return sizes
