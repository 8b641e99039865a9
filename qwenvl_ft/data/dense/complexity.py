"""Split a dense-caption file by the complexity of its records, for training on simple records first.

Levels may overlap: by default ``full`` is the whole file, for the last phase of a curriculum.
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
from qwenvl_ft.data.sources.json_files import parse_json, read_jsonl, sound
from qwenvl_ft.errors import DataError, unknown_name

LEVELS = {"simple": "1-3", "medium": "4-10", "full": "0-"}
"""Level -> range of the measure; without a number after the dash there is no upper limit."""
REST = "rest"
"""Key of the records without a level in the result of `split_by_complexity`."""


def _points(record: DenseRecord) -> int:
    return sum(len(entry[geometry_of(entry)]) // 2 for entry in record.objects)


def _classes(record: DenseRecord) -> int:
    return len({entry["desc"].split("/")[0].strip() for entry in record.objects})


MEASURES: dict[str, Callable[[DenseRecord], int]] = {
    "objects": lambda record: len(record.objects),
    "points": _points,
    "classes": _classes,
}
"""Name -> measure: the number of objects, of the points that outline them, or of classes (first level of ``desc``)."""


def split_by_complexity(
    path: str | Path,
    folder: str | Path | None = None,
    *,
    levels: Mapping[str, str] = LEVELS,
    measure: str = "objects",
) -> dict[str, int]:
    """Write ``NAME.LEVEL.jsonl`` for each level; the records keep their order.

    Args:
        path: a .jsonl file of dense-caption records.
        folder: folder of the new files; None is the folder of ``path``. For another folder, relative image paths are
            rewritten.
        levels: level -> range of the measure, both ends included.
        measure: a name of `MEASURES`.

    Returns:
        Level -> number of records; ``rest`` counts those without a level.

    Raises:
        DataError: the file does not exist, a record is malformed, or a range cannot be parsed.
        RecipeError: the measure is unknown.
    """
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    if REST in levels:
        raise DataError(f"{REST!r} cannot be the name of a level: it counts the records without one.")
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
            for place, text in sound(read_jsonl(path)):
                record, line = _read(path, place, text, target)
                count = MEASURES[measure](record)
                matching = [
                    name for name, (low, high) in ranges.items() if low <= count and (high is None or count <= high)
                ]
                for name in matching:
                    files[name].write(line + "\n")
                for name in matching or [REST]:
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
    """Return a record, and its line for a file in the folder ``target``."""
    raw = parse_json(text, f"{path}{place}")
    record = read_dense_record(raw, Source(path.name, f"{path}{place}"))
    if target.resolve() == path.parent.resolve():
        return record, text
    return record, json.dumps(
        raw | {"images": [_moved(image, path.parent, target) for image in raw["images"]]}, ensure_ascii=False
    )


def _moved(image: Any, before: Path, after: Path) -> Any:
    """Rewrite a path relative to the folder ``before`` as relative to ``after``."""
    found = resolve_path(image, before.resolve())
    return image if found == image else os.path.relpath(found, after.resolve())


def _range(name: str, text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"\s*(\d+)\s*(-?)\s*(\d*)\s*", text)
    if found is None or (found[3] and not found[2]):
        raise DataError(f"level {name}={text!r} is not a range. Write 1-3, 4- or 5.")
    low = int(found[1])
    high = low if not found[2] else int(found[3]) if found[3] else None
    if high is not None and high < low:
        raise DataError(f"level {name}={text!r} has its limits in the wrong order. Write the smaller one first.")
    return low, high
