"""Names of data sets, and what a selection like ``a%50,b#1000,my.jsonl%200,shards/*.tar`` means."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path

from qwenvl_ft.errors import DataError, hint

DATASETS: dict[str, dict[str, str]] = {}
"""Name -> ``{"annotation_path": file, "data_path": folder of relative media}``, in the order of registration. An
empty ``data_path`` means that media paths are absolute or relative to ``data.media_root`` or the annotation file."""

data_dict = DATASETS
"""The name that qwen-vl-finetune has for it."""

ENTRY = ("annotation_path", "data_path", "reader")
FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
"""How the name of a data set's file may end; a folder that `datasets` saved is one too."""

Amount = float | int
"""How much of a data set is taken: a float is a share, 1.0 for all; an int is so many records."""


def register_dataset(name: str, annotation_path: str, data_path: str = "", *, reader: str | None = None) -> None:
    """Give a data set a name for recipes; a second registration replaces the first.

    Args:
        annotation_path: a file ending in one of `FILES`, or a folder that ``Dataset.save_to_disk`` wrote
            (``folder:split`` for one of several), or a pattern of such files (``shards/*.tar``); they may be created
            later, but before training.
        data_path: folder that relative media paths start at.
        reader: name of the format, or the import path ``module:name`` of one's own; None recognises the format record
            by record.

    Raises:
        DataError: the name is empty or would be read as part of a selection.
    """
    if not name or re.search(r"[,%#\s/]", name):
        raise DataError(f"data set name {name!r}: use letters, digits, '_', '-' and '.' only.")
    DATASETS[name] = {"annotation_path": annotation_path, "data_path": data_path} | (
        {"reader": reader} if reader else {}
    )


def parse_selection(selection: str | list[str] | Mapping[str, float]) -> list[tuple[str, Amount]]:
    """``"a%50,b,c#9"`` or ``["a%50", "b", "c#9"]`` -> ``[("a", 0.5), ("b", 1.0), ("c", 9)]``; ``{"a": 3}`` is weights
    -> ``[("a", 3.0)]``.

    A string is split at its commas; the path of a file that has one stands in a list.

    Raises:
        DataError: an empty selection, a rate that is not a positive number of percent, a number that is no count of
            records, or a weight that is none.
    """
    chosen: list[tuple[str, Amount]]
    if isinstance(selection, Mapping):
        chosen = [(name, _weight(name, weight)) for name, weight in selection.items()]
    else:
        parts = selection.split(",") if isinstance(selection, str) else list(selection)
        chosen = [_parse(part.strip()) for part in parts if part.strip()]
    if not chosen:
        raise DataError("no data set is chosen. Example: data.train=my.jsonl or data.train=a%50,b.")
    return chosen


def _weight(name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise DataError(f"data set {name}: its weight {weight!r:.80} must be a positive number, as in {{a: 3, b: 1}}.")
    return float(weight)


def _parse(part: str) -> tuple[str, Amount]:
    if part.endswith(FILES):  # no rate ends so: a % or # belongs to the file's name
        return part, 1.0
    name, mark, count = part.rpartition("#")
    if mark and name and count.isdecimal() and int(count):
        return name, int(count)
    if mark and not set(count) & {"%", "/", "."}:
        raise DataError(f"data set {part!r}: behind # stands the number of records to draw, 1 or more, as in a#1000.")
    name, percent, rate = part.rpartition("%")
    if not percent:
        return part, 1.0
    try:
        share = float(rate) / 100
    except ValueError:
        share = -1.0
    if not name or not 0 < share < float("inf"):
        raise DataError(f"data set {part!r}: the rate behind % must be a positive number of percent, as in a%50.")
    return name, share


def find_dataset(name: str) -> dict[str, str]:
    """The entry of a registered name, or one made for the path of a file.

    Raises:
        DataError: neither is there; the message begins as qwen-vl-finetune's (``do not find NAME``). Or the entry,
            which may have been put into `DATASETS` by hand, is not one.
    """
    if name in DATASETS:
        entry = DATASETS[name]
        wrong = sorted(set(entry) - set(ENTRY)) or ([] if entry.get("annotation_path") else ["no annotation_path"])
        if wrong:
            raise DataError(f"data set {name}: {', '.join(wrong)} in its entry.{hint(wrong[0], ENTRY)}")
        return {"data_path": ""} | entry
    path = Path(name)
    folder, _, split = name.rpartition(":")
    if is_pattern(name):
        matching_files(name)
        return {"annotation_path": name, "data_path": ""}
    if path.is_dir() or (split and folder and Path(folder).is_dir()):
        return {"annotation_path": name, "data_path": ""}
    if path.suffix in FILES:
        if path.is_file():
            return {"annotation_path": name, "data_path": ""}
        raise DataError(f"do not find {name}: there is no such file.")
    if path.exists():
        raise DataError(f"do not find {name}: a data set is a file ending in {', '.join(FILES)}, this is not.")
    raise DataError(
        f"do not find {name}.{hint(name, DATASETS)} Or give the path of a file ending in {', '.join(FILES)}."
    )


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files, as ``shards/*.tar``."""
    return glob.has_magic(path) and not Path(path).exists()


def matching_files(path: str) -> list[str]:
    """The files of a pattern in the order of their names; a path that is none is itself.

    Raises:
        DataError: no file matches, or one is no data set.
    """
    if not is_pattern(path):
        return [path]
    files = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))  # noqa: PTH207 - a whole path, not a folder
    if not files:
        raise DataError(f"do not find {path}: no file matches.")
    if wrong := [file for file in files if not file.endswith(FILES)]:
        raise DataError(f"{path} matches {wrong[0]}, but a data set is a file ending in {', '.join(FILES)}.")
    return files
