"""Records of a .json or .jsonl file as raw JSON text, each with its place; the file is read as a stream.

A place is the suffix that messages append to the file's name: ``:12`` for line 12 of a .jsonl, ``[3]`` for entry 3 of a
.json list. An entry that is itself a list (a packed sample of qwen-vl-finetune) holds several records, ``[3][0]``,
``[3][1]``, ...; they are packed anew with all other records.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from qwenvl_ft.errors import DataError

CHUNK = 2**20
"""Characters of a .json file to read at a time; doubled while one record needs more."""
LONGEST_WORD = 16
"""Characters. A syntax error this close to the end of a chunk may come from a token (``-Infinity``, an escape) that the
chunk cuts in two."""
DECODER = json.JSONDecoder()
USE_JSONL = "A file with one record per line must be named .jsonl."
BLANK = " \t\r\n"
"""Whitespace that JSON allows between values."""
Entry = tuple[str, str | DataError]
"""Place and JSON text of a record, or why that one record cannot be read."""


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text.

    Args:
        where: file and place, for the message.

    Raises:
        DataError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from None


def sound(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every entry; raise the error of the first that cannot be read."""
    for place, text in entries:
        if isinstance(text, DataError):
            raise text
        yield place, text


def read_jsonl(path: Path) -> Iterator[Entry]:
    """Yield every line that is not blank; an error for one that is not UTF-8, or a list that is not valid JSON.

    Other lines are not parsed.
    """
    with path.open("rb") as file:  # as bytes: lines end at newlines only, and a decoding error can name its line
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(BLANK)
            except UnicodeDecodeError as error:
                message = f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}. Save as UTF-8."
                yield f":{number}", DataError(message)
                continue
            if text:
                yield from _unpacked(text, path, f":{number}")


def load_jsonl(path: str | Path) -> list[Any]:
    """Load all records of a .jsonl file, to inspect or edit them; blank lines are skipped.

    Raises:
        DataError: the file does not exist, or a line is not UTF-8 or not JSON; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    return [parse_json(text, f"{path}{place}") for place, text in sound(read_jsonl(path))]


def read_json(path: Path) -> Iterator[Entry]:
    """Yield every entry of a list, without holding the list in memory.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not a list.
    """
    with _open_utf8(path) as file:
        for number, text in enumerate(JsonStream(file, path).entries()):
            yield from _unpacked(text, path, f"[{number}]")


def opens_object(path: Path) -> bool:
    """Return True if the first non-blank character of the file is ``{``."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return JsonStream(file, path).peek() == "{"


def read_members(path: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield (key, texts) of every member of the file's one object: the texts of a list's entries, or of another value.

    The texts must be consumed before the next member is requested.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not an object.
    """
    with _open_utf8(path) as file:
        yield from JsonStream(file, path).members()


@contextmanager
def _open_utf8(path: Path) -> Iterator[TextIO]:
    """Open a text file; reading what is not UTF-8 raises DataError."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            wrong = error.object[error.start : error.end]
            raise DataError(f"{path}: not UTF-8: {error.reason}, {wrong!r}. Save the file as UTF-8.") from None


def _unpacked(text: str, path: Path, place: str) -> Iterator[Entry]:
    """Yield the record, or each record of a packed sample."""
    if not text.startswith("["):
        yield place, text
        return
    try:
        records = parse_json(text, f"{path}{place}")
    except DataError as error:
        yield place, error
        return
    for number, record in enumerate(records):
        yield f"{place}[{number}]", json.dumps(record)


class JsonStream:
    """Iterates over the values of a JSON file as texts; holds one chunk of the file, or one value if that is longer."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.start = 0
        self.lines = 0
        """Newlines in the text that was dropped from the front of ``text``."""

    def entries(self) -> Iterator[str]:
        """Yield the text of each entry of the file's one list."""
        mark = self.peek()
        if mark != "[":
            found = {"{": "this one holds a dict", "": "this one is empty"}.get(mark, f"this one begins with {mark!r}")
            raise DataError(f"{self.path}: a .json file holds a list of records, but {found}. {USE_JSONL}")
        yield from self._list()
        if self.peek():
            raise self._error("more text behind the list", self.start)

    def members(self) -> Iterator[tuple[str, Iterator[str]]]:
        """Yield each key of the file's one object with the texts of its list, or the text of its value."""
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
                f"{self.path}: a .json file holds a list of records, but this one goes on after a dict. {USE_JSONL}"
            )

    def peek(self) -> str:
        """Move ``start`` to the next non-blank character and return it; return "" at the end of the file."""
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
        """Return the text of the value that begins here, and move ``start`` past it."""
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
                if end < len(self.text) or not self._more(size):  # a number may continue in the next chunk
                    entry = self.text[self.start : end]
                    self.start = end
                    return entry
            size *= 2

    def _more(self, size: int) -> bool:
        """Read ``size`` more characters and drop the consumed ones; return False at the end of the file."""
        chunk = self.file.read(size)
        if chunk:
            self.lines += self.text.count("\n", 0, self.start)
            self.text = self.text[self.start :] + chunk
            self.start = 0
        return bool(chunk)

    def _error(self, message: str, place: int) -> DataError:
        line = self.lines + self.text.count("\n", 0, place) + 1
        return DataError(f"{self.path}:{line}: not valid JSON: {message}.")
