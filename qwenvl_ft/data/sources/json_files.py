"""Records of a .json or .jsonl file as raw JSON text, each with its place; the file is read as a stream.

A place is the suffix that messages append to the file's name: ``:12`` for line 12 of a .jsonl, ``[3]`` for entry 3 of a
.json list. An entry that is itself a list (a packed sample of qwen-vl-finetune) holds several records, ``[3][0]``,
``[3][1]``, ...; they are packed anew with all other records.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from qwenvl_ft.data.record_size import is_too_large, too_large
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.schema import DataConfig

CHUNK = 2**20
"""Characters of a .json file to read at a time; doubled while one record needs more."""
LONGEST_WORD = 16
"""Characters. A syntax error this close to the end of a chunk may come from a token (``-Infinity``, an escape) that the
chunk cuts in two."""
DECODER = json.JSONDecoder()
USE_JSONL = "A file with one record per line must be named .jsonl."
MAX_BYTES = DataConfig.max_record_bytes
MARKS = re.compile(r'[\\"{}[\]]')
"""The characters that tell where a JSON value ends."""
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


def read_jsonl(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[Entry]:
    """Yield every line that is not blank; an error for one that is not UTF-8, has more than ``max_bytes`` of text, or
    is a list that is not valid JSON.

    Other lines are not parsed. No more of a line than ``max_bytes`` and its media are held in memory.
    """
    with path.open("rb") as file:  # as bytes: lines end at newlines only, and a decoding error can name its line
        for number, line in enumerate(_lines(file, max_bytes), 1):
            if isinstance(line, int):
                yield f":{number}", too_large(f"{path}:{number}", line, max_bytes)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(BLANK)
            except UnicodeDecodeError as error:
                message = f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}. Save as UTF-8."
                yield f":{number}", DataError(message)
                continue
            if text:
                yield from _unpacked(text, path, f":{number}")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | int]:
    """Yield each line, or the size of one that is too large."""
    step = max_bytes + 1
    while line := file.readline(step):
        while len(line) > max_bytes and not line.endswith(b"\n"):
            if is_too_large(line, max_bytes):
                break
            more = file.readline(len(line))
            line += more
            if not more:
                break
        if not is_too_large(line, max_bytes):
            yield line
            continue
        size, ended = len(line), line.endswith(b"\n")
        del line
        while not ended and (rest := file.readline(CHUNK)):
            size, ended = size + len(rest), rest.endswith(b"\n")
        yield size


def load_jsonl(path: str | Path, *, max_record_bytes: int = MAX_BYTES) -> list[Any]:
    """Load all records of a .jsonl file, to inspect or edit them; blank lines are skipped.

    Raises:
        DataError: the file does not exist, or a line is not UTF-8, not JSON or has more text than
            ``max_record_bytes``; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    return [parse_json(text, f"{path}{place}") for place, text in sound(read_jsonl(path, max_record_bytes))]


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[Entry]:
    """Yield every entry of a list, without holding the list in memory; an error for one of more than ``max_bytes``.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not a list.
    """
    with _open_utf8(path) as file:
        for number, text in enumerate(JsonStream(file, path, max_bytes).entries()):
            if isinstance(text, int):
                yield f"[{number}]", too_large(f"{path}[{number}]", text, max_bytes)
            else:
                yield from _unpacked(text, path, f"[{number}]")


def opens_object(path: Path) -> bool:
    """Return True if the first non-blank character of the file is ``{``."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return JsonStream(file, path).peek() == "{"


def read_members(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield (key, texts) of every member of the file's one object: the texts of a list's entries, or of another value.

    The texts must be consumed before the next member is requested.

    Raises:
        DataError: the file is not UTF-8, not JSON, or not an object, or an entry has more than ``max_bytes``.
    """

    def small(key: str, entries: Iterator[str | int]) -> Iterator[str]:
        for number, text in enumerate(entries):
            if isinstance(text, int):
                raise too_large(f"{path}:{key}[{number}]", text, max_bytes, "entry")
            yield text

    with _open_utf8(path) as file:
        for key, entries in JsonStream(file, path, max_bytes).members():
            yield key, small(key, entries)


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
    """Iterates over the values of a JSON file as texts; holds one chunk of the file, or one value if that is longer.

    An entry of a list with more than ``max_bytes`` of text is passed over; its size in bytes stands in its place.
    """

    def __init__(self, file: TextIO, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.file = file
        self.path = path
        self.max_bytes = max_bytes
        self.text = ""
        self.start = 0
        self.lines = 0
        """Newlines in the text that was dropped from the front of ``text``."""

    def entries(self) -> Iterator[str | int]:
        """Yield the text of each entry of the file's one list."""
        mark = self.peek()
        if mark != "[":
            found = {"{": "this one holds a dict", "": "this one is empty"}.get(mark, f"this one begins with {mark!r}")
            raise DataError(f"{self.path}: a .json file holds a list of records, but {found}. {USE_JSONL}")
        yield from self._list()
        if self.peek():
            raise self._error("more text behind the list", self.start)

    def members(self) -> Iterator[tuple[str, Iterator[str | int]]]:
        """Yield each key of the file's one object with the texts of its list, or the text of its value."""
        self._take("{", "Expecting an object")
        mark = self._take("}", "") if self.peek() == "}" else ","
        while mark == ",":
            if self.peek() != '"':
                raise self._error("Expecting a name in double quotes", self.start)
            key = json.loads(self._text())
            self._take(":", "Expecting ':' behind a name")
            yield key, self._list() if self.peek() == "[" else iter([self._text()])
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

    def _list(self) -> Iterator[str | int]:
        self._take("[", "Expecting a list")
        mark = self._take("]", "") if self.peek() == "]" else ","
        while mark == ",":
            yield self._value(self.max_bytes)
            mark = self._take(",]", "Expecting ',' or ']' behind a record")

    def _take(self, marks: str, message: str) -> str:
        mark = self.peek()
        if not mark or mark not in marks:
            raise self._error(message, self.start)
        self.start += 1
        return mark

    def _text(self) -> str:
        """Return the text of the value that begins here, whatever its size."""
        text = self._value(None)
        assert isinstance(text, str)
        return text

    def _value(self, max_bytes: int | None) -> str | int:
        """Return the text of the value that begins here, or its size if it is too large; move ``start`` past it."""
        self.peek()
        size = CHUNK
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_WORD
                if cut and self._is_too_large(len(self.text), max_bytes):
                    return self._skip()
                if not cut or not self._more(size):
                    raise self._error(error.msg, error.pos) from None
            except (RecursionError, ValueError):  # the latter for a number of thousands of digits
                raise self._error("nested too deeply, or a number is too long", self.start) from None
            else:
                if end < len(self.text) or not self._more(size):  # a number may continue in the next chunk
                    if self._is_too_large(end, max_bytes):
                        return self._skip()
                    entry = self.text[self.start : end]
                    self.start = end
                    return entry
            size *= 2

    def _is_too_large(self, end: int, max_bytes: int | None) -> bool:
        """Judge the text from ``start`` to ``end``."""
        if max_bytes is None or (end - self.start) * 4 <= max_bytes:
            return False
        return is_too_large(self.text[self.start : end].encode("utf-8", "surrogatepass"), max_bytes)

    def _skip(self) -> int:
        """Move ``start`` past the object, list or text that begins here, without parsing it; return its bytes."""
        size = depth = 0
        quoted = False
        begin = place = self.start
        while True:
            mark = MARKS.search(self.text, place)
            if mark is None:
                size += len(self.text[begin:].encode("utf-8", "surrogatepass"))
                over = max(0, place - len(self.text))  # a backslash was the last character
                self.start = len(self.text)
                if not self._more(CHUNK):
                    raise self._error("Unterminated value", self.start)
                begin, place = 0, over
                continue
            place = mark.end()
            if mark[0] == "\\":
                place += 1
            elif mark[0] == '"':
                quoted = not quoted
            elif not quoted:
                depth += 1 if mark[0] in "{[" else -1
            if not quoted and not depth:
                self.start = place
                return size + len(self.text[begin:place].encode("utf-8", "surrogatepass"))

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
