"""Registry of data sets by name, and the parser of selections such as ``a%50,b#1000,my.jsonl%200,shards/*.tar``."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.reading import reading_of
from qwenvl_ft.errors import DataError, hint
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS

DATASETS: dict[str, dict[str, Any]] = {}
"""Name -> ``{"annotation_path": file, "data_path": folder of relative media}``, in the order of registration. An
empty ``data_path`` means that media paths are absolute or relative to ``data.media_root`` or the annotation file. The
other keys of `ENTRY` are optional."""

UNLISTED: dict[str, dict[str, Any]] = {}
"""Entries that selections find by name, and that a listing of `DATASETS` leaves out: splits for evaluation."""

data_dict = DATASETS
"""qwen-vl-finetune's name for `DATASETS`."""

ENTRY = ("annotation_path", "data_path", "reader", *IMAGE_KEYS)
"""Keys of an entry of `DATASETS`."""
FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
"""Extensions of data set files; a folder saved by `datasets` is a data set too."""

Amount = float | int
"""Amount of a data set to take: a float is a share (1.0 is everything), an int a number of records."""


def register_dataset(
    name: str,
    annotation_path: str,
    data_path: str = "",
    *,
    reader: str | None = None,
    listed: bool = True,
    **image_keys: Any,
) -> None:
    """Register a data set under a name for recipes; registering a name again replaces it.

    Args:
        annotation_path: a file with an extension of `FILES`, a folder written by ``Dataset.save_to_disk``
            (``folder:split`` for one of its splits), or a pattern of such files (``shards/*.tar``). The files need not
            exist before training starts.
        data_path: folder that relative media paths start at.
        reader: name of the format, or the import path ``module:name`` of a custom reader; None recognises the format
            of each record.
        listed: False puts the entry into `UNLISTED`.
        image_keys: ``high_bit_depth``, ``window`` and ``image_frame`` of its images, as in a recipe's ``data``; a
            record's own keys take precedence.

    Raises:
        DataError: the name is empty or has characters that a selection gives a meaning, or an image key is wrong.
    """
    if not name or re.search(r"[,%#\s/]", name):
        raise DataError(f"data set name {name!r}: use letters, digits, '_', '-' and '.' only.")
    if unknown := sorted(set(image_keys) - set(IMAGE_KEYS)):
        raise DataError(f"data set {name}: unknown key {unknown[0]!r}.{hint(unknown[0], ENTRY)}")
    reading_of(image_keys, f"data set {name}: ")
    optional = {"reader": reader, **image_keys}
    table, other = (DATASETS, UNLISTED) if listed else (UNLISTED, DATASETS)
    other.pop(name, None)
    table[name] = {"annotation_path": annotation_path, "data_path": data_path}
    table[name] |= {key: value for key, value in optional.items() if value not in (None, "")}


def parse_selection(selection: str | list[str] | Mapping[str, float]) -> list[tuple[str, Amount]]:
    """Parse a selection into (name, amount) pairs; a mapping gives (name, weight) pairs.

    A string is split at its commas; use a list for a path that contains one.

    Example:
        ``"a%50,b,c#9"`` and ``["a%50", "b", "c#9"]`` give ``[("a", 0.5), ("b", 1.0), ("c", 9)]``; ``{"a": 3}`` gives
        ``[("a", 3.0)]``.

    Raises:
        DataError: the selection is empty, or a rate, a number of records or a weight is not a positive number.
    """
    chosen: list[tuple[str, Amount]]
    if isinstance(selection, Mapping):
        chosen = [(name, _weight(name, weight)) for name, weight in selection.items()]
    else:
        parts = selection.split(",") if isinstance(selection, str) else list(selection)
        chosen = [_parse(part.strip()) for part in parts if part.strip()]
    if not chosen:
        raise DataError("no data set is selected. Example: data.train=my.jsonl or data.train=a%50,b.")
    return chosen


def _weight(name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise DataError(f"data set {name}: its weight {weight!r:.80} must be a positive number, as in {{a: 3, b: 1}}.")
    return float(weight)


def _parse(part: str) -> tuple[str, Amount]:
    if part.endswith(FILES):  # no rate ends like this: any % or # belongs to the file's name
        return part, 1.0
    name, mark, count = part.rpartition("#")
    if mark and name and count.isdecimal() and int(count):
        return name, int(count)
    if mark and not set(count) & {"%", "/", "."}:
        raise DataError(f"data set {part!r}: after # write the number of records to draw, 1 or more, as in a#1000.")
    name, percent, rate = part.rpartition("%")
    if not percent:
        return part, 1.0
    try:
        share = float(rate) / 100
    except ValueError:
        share = -1.0
    if not name or not 0 < share < float("inf"):
        raise DataError(f"data set {part!r}: the rate after % must be a positive percentage, as in a%50.")
    return name, share


def find_dataset(name: str) -> dict[str, Any]:
    """Return the entry of a registered name, or a new entry for the path of a file.

    Raises:
        DataError: there is no such name or file; the message begins like qwen-vl-finetune's (``do not find NAME``).
            Or the entry, which may have been added to `DATASETS` directly, is malformed.
    """
    known = UNLISTED | DATASETS
    if name in known:
        entry = known[name]
        if unknown := sorted(set(entry) - set(ENTRY)):
            keys = ", ".join(map(repr, unknown))
            raise DataError(f"data set {name}: unknown key {keys} in its entry.{hint(unknown[0], ENTRY)}")
        if not entry.get("annotation_path"):
            raise DataError(f"data set {name}: no annotation_path in its entry. Known: {', '.join(ENTRY)}.")
        reading_of(entry, f"data set {name}: ")
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
        raise DataError(f"do not find {name}: a data set must be a file ending in {', '.join(FILES)}.")
    raise DataError(f"do not find {name}.{hint(name, known)} Or give the path of a file ending in {', '.join(FILES)}.")


def is_pattern(path: str) -> bool:
    """Return True if a path is a pattern such as ``shards/*.tar``, and not a file."""
    return glob.has_magic(path) and not Path(path).exists()


def matching_files(path: str) -> list[str]:
    """Return the files that match a pattern, sorted by name; a path that is not a pattern is returned as it is.

    Raises:
        DataError: no file matches, or a match is not a data set file.
    """
    if not is_pattern(path):
        return [path]
    files = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))  # noqa: PTH207 - a whole path, not a folder
    if not files:
        raise DataError(f"do not find {path}: no file matches.")
    if wrong := [file for file in files if not file.endswith(FILES)]:
        raise DataError(f"{path} matches {wrong[0]}, but a data set must be a file ending in {', '.join(FILES)}.")
    return files
