"""Where a split's questions and images lie in ``organized_dataset``, and which file of several is taken.

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
"""Split -> (folder, file) in the order in which they are looked for."""

IMAGE_FOLDERS = ("imagesTr", "imagesVal", "imagesTs", "images")
NO_TEXT = ("", "none", "null", "nan")
"""Texts, in lower case, that stand for nothing."""
BASES = ("organized_dataset", "../organized_dataset")
"""Where the data is looked for if no folder is given."""


@dataclass(frozen=True)
class Questions:
    """The questions of a split, as their file holds them."""

    dataset: FlareDataset
    split: str
    file: Path
    records: list[Any]
    passed_over: tuple[Path, ...] = ()
    """Files that come first but hold no answer at all."""

    @property
    def folder(self) -> Path:
        """Where the paths of images start."""
        return self.file.parent


def find_base(given: str | Path | None) -> Path:
    """The folder of the data: as given, else ``organized_dataset`` here or one level up.

    Raises:
        DataError: there is none.
    """
    folders = BASES if given is None else (given,)
    found = next((Path(folder) for folder in folders if Path(folder).is_dir()), None)
    if found is None:
        raise DataError(f"there is no folder {' or '.join(map(str, folders))}. Give the FLARE data with --input_dir.")
    return found


def find_questions(base: str | Path, dataset: FlareDataset, split: str, *, answered: bool = True) -> Questions | None:
    """The questions of a split, or None if there is no file of them.

    Hidden validation data with its answers is taken first, then without, then the public one.

    Args:
        answered: pass over a file in which no question has an answer, if a later one does.

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
    """The list that a file of questions holds.

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
    """The answer as text, ``""`` where there is none. The number 0 is an answer, ``"None"`` is not."""
    value = record[key] if key in record else None
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    text = str(value).strip()
    return "" if text.lower() in NO_TEXT else text


def image_names(record: dict[str, Any]) -> list[str]:
    """The names of a question's images, in order; empty where there are none, or something else than names."""
    value = record["ImageName"] if "ImageName" in record else None
    names = value if isinstance(value, list) else [value]
    kept = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    return kept if len(kept) == len(names) else []


def find_image(folder: Path, name: str) -> Path | None:
    """The file of an image below a data set's folder, or None: as named, else by its last part in an image folder."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return None
    places = [folder.joinpath(*parts), *(folder / images / parts[-1] for images in IMAGE_FOLDERS)]
    return next((place for place in places if place.is_file()), None)


def unpacking_hint(folder: Path) -> str:
    """What to do if a data set's images are still packed, else nothing."""
    packed = sorted(folder.glob("*.zip"))
    if not packed or any((folder / images).is_dir() for images in IMAGE_FOLDERS):
        return ""
    return f"its images are still packed: unzip {packed[0]} -d {folder}"


def _dataset_folder(part: Path, dataset: FlareDataset) -> Path | None:
    """The folder of a data set, whatever the case of its and its category's names."""
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
