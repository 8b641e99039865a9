"""Finds the questions and images of a split in ``organized_dataset``, and chooses among several files.

::

    organized_dataset/
      training/Clinical/neojaundice/            neojaundice_questions_train.json           imagesTr/...
      validation-hidden/Clinical/neojaundice/   neojaundice_questions_val[_withGT].json    imagesVal/...
      validation-public/Clinical/neojaundice/   neojaundice_questions_val.json             imagesVal/...
      testing/Clinical/neojaundice/             neojaundice_questions_test[_withGT].json   imagesTs/...
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import DataError, hint, one_line
from qwenvl_ft.flare.catalog import FlareDataset

CANDIDATES: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (("training", "{name}_questions_train.json"),),
    "val": (
        ("validation-hidden", "{name}_questions_val_withGT.json"),
        ("validation-hidden", "{name}_questions_val.json"),
        ("validation-public", "{name}_questions_val.json"),
    ),
    "test": (
        ("testing", "{name}_questions_test_withGT.json"),
        ("testing", "{name}_questions_test.json"),
    ),
}
"""Split -> (folder, file name) in the order in which they are tried."""

IMAGE_FOLDERS = ("imagesTr", "imagesVal", "imagesTs", "images")
NO_TEXT = ("", "none", "null", "nan")
"""Texts, in lower case, that mean no value."""
BASES = ("organized_dataset", "../organized_dataset")
"""Folders that are tried if none is given."""


@dataclass(frozen=True)
class Questions:
    """The questions of a split, as stored in their file."""

    dataset: FlareDataset
    split: str
    file: Path
    records: list[Any]
    passed_over: tuple[Path, ...] = ()
    """Files of higher priority that were skipped because they hold no answer."""

    @property
    def folder(self) -> Path:
        """Folder to which image paths are relative."""
        return self.file.parent


def find_base(folder: str | Path | None) -> Path:
    """Return the data folder: ``folder``, or ``organized_dataset`` in the working directory or one level up.

    Raises:
        DataError: it does not exist.
    """
    folders = BASES if folder is None else (folder,)
    found = next((Path(place) for place in folders if Path(place).is_dir()), None)
    if found is None:
        raise DataError(f"there is no folder {' or '.join(map(str, folders))}. Give the FLARE data with --input_dir.")
    return found


def find_questions(base: str | Path, dataset: FlareDataset, split: str, *, answered: bool = True) -> Questions | None:
    """Return the questions of a split, or None if there is no file.

    Hidden validation data with answers comes first, then without answers, then the public data.

    Args:
        answered: skip a file without any answer if a later one has answers.

    Raises:
        DataError: the split does not exist, or a file is not a JSON list.
    """
    if split not in CANDIDATES:
        raise DataError(f"unknown split {split!r}.{hint(split, CANDIDATES)}")
    read: list[Questions] = []
    for part, pattern in CANDIDATES[split]:
        folder = _dataset_folder(Path(base) / part, dataset)
        file = folder / pattern.format(name=dataset.name) if folder is not None else None
        if file is None or not file.is_file():
            continue
        passed_over = tuple(earlier.file for earlier in read)
        read.append(
            Questions(dataset, split, Path(os.path.normpath(file.absolute())), read_questions(file), passed_over)
        )
        if not answered or any(answer_text(record) for record in read[-1].records if isinstance(record, dict)):
            return read[-1]
    return read[0] if read else None


def read_questions(file: str | Path) -> list[Any]:
    """Read a file of questions.

    Raises:
        DataError: it cannot be read, or is not a JSON list.
    """
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {one_line(error)}.") from None
    if not isinstance(records, list):
        raise DataError(f"{file}: questions are a JSON list, this is a {type(records).__name__}.")
    return records


def answer_text(record: dict[str, Any], key: str = "Answer") -> str:
    """Return the answer as text, ``""`` if there is none. The number 0 is an answer, ``"None"`` is not."""
    value = record[key] if key in record else None
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    text = str(value).strip()
    return "" if text.lower() in NO_TEXT else text


def image_names(record: dict[str, Any]) -> list[str]:
    """Return the image names of a question in order; empty if there are none or one is not a name."""
    value = record["ImageName"] if "ImageName" in record else None
    names = value if isinstance(value, list) else [value]
    kept = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    return kept if len(kept) == len(names) else []


def find_image(folder: Path, name: str) -> list[Path]:
    """Return the files that an image name fits; several mean that the name is ambiguous.

    A name with a folder fits only that file: another folder may hold another picture of the same name. A bare name fits
    the file beside the questions, or else the files of that name in the image folders.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return []
    exact = folder.joinpath(*parts)
    if exact.is_file() or len(parts) > 1:
        return [exact] if exact.is_file() else []
    return [place for images in IMAGE_FOLDERS if (place := folder / images / parts[0]).is_file()]


def unpacking_hint(folder: Path) -> str:
    """Return a hint if a data set's images are still zipped, otherwise ``""``."""
    packed = sorted(folder.glob("*.zip"))
    if not packed or any((folder / images).is_dir() for images in IMAGE_FOLDERS):
        return ""
    return f"its images are still packed: unzip {packed[0]} -d {folder}"


def _dataset_folder(part: Path, dataset: FlareDataset) -> Path | None:
    """Return the folder of a data set; upper and lower case do not matter."""
    exact = part / dataset.category / dataset.name
    if exact.is_dir():
        return exact
    names = {dataset.name.lower()}
    for category in sorted(_folders(part)):
        for folder in [category, *sorted(_folders(category))]:
            if folder.name.lower() in names:
                return folder
    return None


def _folders(place: Path) -> list[Path]:
    return [Path(entry.path) for entry in os.scandir(place) if entry.is_dir()] if place.is_dir() else []
