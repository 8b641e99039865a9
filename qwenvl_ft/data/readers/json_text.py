"""The records of a .json or .jsonl file as raw JSON text, each with its place; the file is read as a stream.

A place is what is written behind the file's name: ``:12`` for line 12 of a .jsonl, ``[3]`` for entry 3 of a .json list.
An entry that is itself a list (a packed sample of qwen-vl-finetune) is several records, ``[3][0]``, ``[3][1]``, ...;
which of them share a row is the plan's to say.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qwenvl_ft.errors import DataError

CHUNK = 2**20
"""Characters of a .json file that are read at a time; doubled while one record needs more."""
LONGEST_WORD = 16
"""An error this close to the end of what was read may be the end's own: ``-Infinity`` or an escape is cut in two."""
DECODER = json.JSONDecoder()
ONE_A_LINE = "One record a line is .jsonl."
BLANK = " \t\r\n"
"""What JSON allows between values."""


def read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line that is not blank.

    Raises:
        DataError: a line is not UTF-8. Bad JSON is left to the one who parses the text, except within a list.
    """
    with path.open("rb") as file:  # as bytes: only a newline ends a line, and an error can name its line
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(BLANK)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}. Save as UTF-8."
                ) from None
            if text:
                yield from _unpacked(text, path, f":{number}")


def load_jsonl(path: str | Path) -> list[Any]:
    """All records of a .jsonl file, to look at or to change; blank lines are skipped.

    Raises:
        DataError: there is no such file, or a line is not UTF-8 or not JSON; it names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    records = []
    for place, text in read_jsonl(path):
        try:
            records.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}{place}: not valid JSON: {error}.") from None
    return records


def read_json(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every entry of a list, without holding the list.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not a list.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, text in enumerate(JsonStream(file, path).entries()):
                yield from _unpacked(text, path, f"[{number}]")
        except UnicodeDecodeError as error:
            wrong = error.object[error.start : error.end]
            raise DataError(f"{path}: not UTF-8: {error.reason}, {wrong!r}. Save the file as UTF-8.") from None


def opens_object(path: Path) -> bool:
    """Whether the file's first character that is not blank is ``{``."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return JsonStream(file, path).peek() == "{"


def read_members(path: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """(key, texts) of every member of the file's one object: a list's entries one by one, any other value whole.

    The texts have to be used up before the next member is asked for.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not an object.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from JsonStream(file, path).members()
        except UnicodeDecodeError as error:
            wrong = error.object[error.start : error.end]
            raise DataError(f"{path}: not UTF-8: {error.reason}, {wrong!r}. Save the file as UTF-8.") from None


def _unpacked(text: str, path: Path, place: str) -> Iterator[tuple[str, str]]:
    if not text.startswith("["):
        yield place, text
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}{place}: not valid JSON: {error}.") from None
    for number, record in enumerate(records):
        yield f"{place}[{number}]", json.dumps(record)


class JsonStream:
    """Walks over the texts of a file's values; holds one chunk of the file, or one value if that is longer."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.start = 0
        self.lines = 0
        """Newlines in what was dropped from the front of ``text``."""

    def entries(self) -> Iterator[str]:
        """The texts of the entries of the file's one list."""
        mark = self.peek()
        if mark != "[":
            told = {"{": "this holds a dict", "": "this is empty"}.get(mark, f"this begins with {mark!r}")
            raise DataError(f"{self.path}: a .json file holds a list of records, {told}. {ONE_A_LINE}")
        yield from self._list()
        if self.peek():
            raise self._error("more text behind the list", self.start)

    def members(self) -> Iterator[tuple[str, Iterator[str]]]:
        """The keys of the file's one object, each with the texts of its list or the text of its value."""
        self._take("{", "Expecting an object")
        mark = self._take("}", "") if self.peek() == "}" else ","
        while mark == ",":
            if self.peek() != '"':
                raise self._error("Expecting a name in double quotes", self.start)
            key = json.loads(self._value())
            self._take(":", "Expecting ':' behind a name")
            yield key, self._list() if self.peek() == "[" else iter([self._value()])
            mark = self._take(",}", "Expecting ',' or '}' behind a member")
        if self.peek():
            raise DataError(
                f"{self.path}: a .json file holds a list of records, this goes on behind a dict. {ONE_A_LINE}"
            )

    def peek(self) -> str:
        """The next character that is not blank, which ``start`` then points at; empty at the end of the file."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in BLANK:
                self.start += 1
            if self.start < len(self.text):
                return self.text[self.start]
            if not self._more(CHUNK):
                return ""

    def _list(self) -> Iterator[str]:
        self._take("[", "Expecting a list")
        mark = self._take("]", "") if self.peek() == "]" else ","
        while mark == ",":
            yield self._value()
            mark = self._take(",]", "Expecting ',' or ']' behind a record")

    def _take(self, marks: str, message: str) -> str:
        mark = self.peek()
        if not mark or mark not in marks:
            raise self._error(message, self.start)
        self.start += 1
        return mark

    def _value(self) -> str:
        """The text of the value that begins here; ``start`` then stands behind it."""
        self.peek()
        size = CHUNK
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_WORD
                if not cut or not self._more(size):
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("nested too deeply", self.start) from None
            else:
                if end < len(self.text) or not self._more(size):  # a number may go on in the next chunk
                    entry = self.text[self.start : end]
                    self.start = end
                    return entry
            size *= 2

    def _more(self, size: int) -> bool:
        """Read on, dropping what is done with; False at the end of the file."""
        chunk = self.file.read(size)
        if chunk:
            self.lines += self.text.count("\n", 0, self.start)
            self.text = self.text[self.start :] + chunk
            self.start = 0
        return bool(chunk)

    def _error(self, message: str, place: int) -> DataError:
        line = self.lines + self.text.count("\n", 0, place) + 1
        return DataError(f"{self.path}:{line}: not valid JSON: {message}.")
