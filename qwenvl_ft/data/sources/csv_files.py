"""Rows of a .csv or .tsv file as JSON text; the first line holds the column names."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qwenvl_ft.data.record_size import LARGEST_MEDIA, is_too_large, too_large
from qwenvl_ft.data.sources.json_files import CHUNK, MAX_BYTES, Entry, parse_json
from qwenvl_ft.errors import DataError

NESTED = (
    "conversations",
    "messages",
    "texts",
    "history",
    "objects",
    "tools",
    "image",
    "images",
    "video",
    "videos",
    "window",
)
"""Columns whose cells may hold JSON lists or objects; other columns are never parsed."""


class BoundedLines:
    """The lines of a table for `csv.reader`, without the text of rows that are too large.

    Of such a row the rest is replaced, line by line, by a quote if the number of its quotes is odd: it then ends where
    the row ends, so that the next row is read as it stands. A row has several lines if a quoted cell holds line breaks.
    """

    def __init__(self, file: TextIO, max_bytes: int) -> None:
        self.file = file
        self.max_bytes = max_bytes
        self.begin_row()

    def begin_row(self) -> None:
        self.over = False
        """True if the current row is too large."""
        self.size = 0
        """Bytes of the current row."""
        self._held: list[str] = []
        self._judge_at = self.max_bytes

    def __iter__(self) -> Iterator[str]:
        while piece := self.file.readline(self.max_bytes + 1):
            begin, quotes = len(self._held), 0
            while piece:
                self.size += len(piece.encode("utf-8", "surrogatepass"))
                quotes += piece.count('"')
                self._held += [] if self.over else [piece]
                if self.size > self._judge_at:
                    self.judge()
                ended = piece.endswith(("\n", "\r"))
                piece = "" if ended else self.file.readline(CHUNK if self.over else max(CHUNK, self.size))
            yield ('"' * (quotes % 2) + "\n") if self.over else "".join(self._held[begin:])

    def judge(self) -> None:
        """Find out whether the row is too large, as far as it has been read."""
        held = "".join(self._held).encode("utf-8", "surrogatepass")
        self.over = self.over or is_too_large(held, self.max_bytes)
        self._judge_at = 2 * self.size  # so that a row of many lines is not judged at each of them
        if self.over:
            self._held = []


def read_table(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[Entry]:
    """Yield (place, JSON) of every row; an empty cell is an absent field.

    A row with more or fewer cells than there are columns, with more than ``max_bytes`` of text, or with a list that is
    not JSON, is an error in its place.

    Raises:
        DataError: the file is not UTF-8, or not a table.
    """
    csv.field_size_limit(max_bytes + LARGEST_MEDIA)  # Python's default of 2**17 is too low for an image in base64
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = BoundedLines(file, max_bytes)
            rows = csv.reader(lines, dialect, strict=True)
            columns = next(rows, [])
            lines.judge()
            if lines.over:
                raise too_large(f"{path}:1", lines.size, max_bytes, "row of column names")
            lines.begin_row()
            for cells in rows:
                place = f":{rows.line_num}"
                lines.judge()
                if lines.over:
                    yield place, too_large(f"{path}{place}", lines.size, max_bytes, "row")
                elif cells:
                    yield place, _row(columns, cells, f"{path}{place}")
                lines.begin_row()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}. Save as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not a table: {error}.") from None


def _row(columns: list[str], cells: list[str], where: str) -> str | DataError:
    try:
        return json.dumps(_record(columns, cells, where), ensure_ascii=False)
    except DataError as error:
        return error


def _record(columns: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(columns):
        raise DataError(
            f"{where}: {len(cells)} cells for {len(columns)} columns ({', '.join(columns)[:80]}). Quote cells that "
            "hold the separator or a line break."
        )
    filled = {column: cell for column, cell in zip(columns, cells, strict=True) if cell != ""}
    return {column: _cell(column, cell, where) for column, cell in filled.items()}


def _cell(column: str, cell: str, where: str) -> Any:
    if column not in NESTED or not cell.lstrip().startswith(("[", "{")):
        return cell
    return parse_json(cell, f"{where}: column {column!r}")
