"""Rows of a .csv or .tsv file as JSON text; the first line holds the column names."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.data.sources.json_files import Entry, parse_json
from qwenvl_ft.errors import DataError

LONGEST_CELL = 2**30
"""Characters; Python's default limit of 2**17 is too low for an image in base64."""
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


def read_table(path: Path) -> Iterator[Entry]:
    """Yield (place, JSON) of every row; an empty cell is an absent field.

    A row with more or fewer cells than there are columns, or with a list that is not JSON, is an error in its place.

    Raises:
        DataError: the file is not UTF-8, or not a table.
    """
    csv.field_size_limit(LONGEST_CELL)
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, dialect, strict=True)
            columns = next(rows, [])
            for cells in rows:
                if cells:
                    place = f":{rows.line_num}"
                    yield place, _row(columns, cells, f"{path}{place}")
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
