"""Names of data sets, and what a selection like ``a%50,b,my.jsonl%200`` means."""

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


def register_dataset(name: str, annotation_path: str, data_path: str = "", *, reader: str | None = None) -> None:
    """Give a data set a name for recipes; a second registration replaces the first.

    Args:
        annotation_path: a file ending in one of `FILES`, or a folder that ``Dataset.save_to_disk`` wrote
            (``folder:split`` for one of several); it may be created later, but before training.
        data_path: folder that relative media paths start at.
        reader: name of the format, or the import path ``module:name`` of one's own; None recognises the format record
            by record.

    Raises:
        DataError: the name is empty or would be read as part of a selection.
    """
    if not name or re.search(r"[,%\s/]", name):
        raise DataError(f"data set name {name!r}: use letters, digits, '_', '-' and '.' only.")
    DATASETS[name] = {"annotation_path": annotation_path, "data_path": data_path} | (
        {"reader": reader} if reader else {}
    )


def parse_selection(selection: str | list[str] | Mapping[str, float]) -> list[tuple[str, float]]:
    """``"a%50,b"`` or ``["a%50", "b"]`` -> ``[("a", 0.5), ("b", 1.0)]``; ``{"a": 3}`` is weights -> ``[("a", 3.0)]``.

    A string is split at its commas; the path of a file that has one stands in a list.

    Raises:
        DataError: an empty selection, a rate that is not a positive number of percent, or a weight that is none.
    """
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


def _parse(part: str) -> tuple[str, float]:
    name, percent, rate = part.rpartition("%")
    if not percent or part.endswith(FILES):  # no rate ends so: the % belongs to the file's name
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
