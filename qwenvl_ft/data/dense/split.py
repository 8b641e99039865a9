"""Split a dense-caption file by how much its records hold, to train from the simple to the full.

Levels may overlap: with the defaults ``full`` is the whole file, the last phase of a curriculum.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.dense_record import DenseRecord, geometry_of, read_dense_record
from qwenvl_ft.data.media.images import resolve_path
from qwenvl_ft.data.readers.json_text import read_jsonl
from qwenvl_ft.errors import DataError, unknown_name

LEVELS = {"simple": "1-3", "medium": "4-10", "full": "0-"}
"""Name -> least and most of what is counted; nothing behind the dash is no limit."""
REST = "rest"
"""What the count calls records of no level."""


def _points(record: DenseRecord) -> int:
    return sum(len(entry[geometry_of(entry)]) // 2 for entry in record.objects)


def _classes(record: DenseRecord) -> int:
    return len({entry["desc"].split("/")[0].strip() for entry in record.objects})


MEASURES: dict[str, Callable[[DenseRecord], int]] = {
    "objects": lambda record: len(record.objects),
    "points": _points,
    "classes": _classes,
}
"""What may be counted: objects, the points that outline them, or different classes (first level of ``desc``)."""


def split_by_complexity(
    path: str | Path,
    folder: str | Path | None = None,
    *,
    levels: Mapping[str, str] = LEVELS,
    measure: str = "objects",
) -> dict[str, int]:
    """Write ``NAME.LEVEL.jsonl`` for each level, records in their order.

    Args:
        path: a .jsonl of dense-caption records.
        folder: where the files go; None is beside ``path``. Elsewhere, relative images are rewritten to be found.
        levels: name -> range of the measure, both ends included.
        measure: a name of `MEASURES`.

    Returns:
        Level -> number of records; ``rest`` counts those of no level.

    Raises:
        DataError: a record is malformed, or a range cannot be read.
    """
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    if REST in levels:
        raise DataError(f"{REST!r} cannot name a level: it counts the records of none.")
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    target = path.parent if folder is None else Path(folder)
    ranges = {name: _range(name, text) for name, text in levels.items()}
    target.mkdir(parents=True, exist_ok=True)
    partial = {name: target / f"{path.stem}.{name}.jsonl.{os.getpid()}.partial" for name in ranges}
    counts = dict.fromkeys([*ranges, REST], 0)
    try:
        files = {name: file.open("w", encoding="utf-8") for name, file in partial.items()}
        try:
            for place, text in read_jsonl(path):
                record, line = _read(path, place, text, target)
                count = MEASURES[measure](record)
                chosen = [
                    name for name, (low, high) in ranges.items() if low <= count and (high is None or count <= high)
                ]
                for name in chosen:
                    files[name].write(line + "\n")
                for name in chosen or [REST]:
                    counts[name] += 1
        finally:
            for file in files.values():
                file.close()
        for name, written in partial.items():
            written.replace(target / f"{path.stem}.{name}.jsonl")
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)
    return counts


def _read(path: Path, place: str, text: str, target: Path) -> tuple[DenseRecord, str]:
    """A record, and the line that stands for it in the folder ``target``."""
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}{place}: not valid JSON: {error}.") from None
    record = read_dense_record(raw, Source(path.name, f"{path}{place}"))
    if target.resolve() == path.parent.resolve():
        return record, text
    return record, json.dumps(
        raw | {"images": [_moved(image, path.parent, target) for image in raw["images"]]}, ensure_ascii=False
    )


def _moved(image: Any, before: Path, after: Path) -> Any:
    """A relative path as it is seen from another folder."""
    found = resolve_path(image, before.resolve())
    return image if found == image else os.path.relpath(found, after.resolve())


def _range(name: str, text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"\s*(\d+)\s*(-?)\s*(\d*)\s*", text)
    if found is None or (found[3] and not found[2]):
        raise DataError(f"level {name}={text!r} is not a range. Write 1-3, 4- or 5.")
    low = int(found[1])
    high = low if not found[2] else int(found[3]) if found[3] else None
    if high is not None and high < low:
        raise DataError(f"level {name}={text!r} is upside down. Write the least first.")
    return low, high
