"""Catalog of FLARE25's data sets: their tasks, and their names in recipes."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from qwenvl_ft.data.sources.registry import register_dataset
from qwenvl_ft.errors import DataError, hint, one_line

CLASSIFICATION = "classification"
MULTI_LABEL = "multi-label classification"
DETECTION = "detection"
INSTANCE_DETECTION = "instance detection"
COUNTING = "counting"
REGRESSION = "regression"
REPORT = "report generation"

TASKS: dict[str, tuple[str, ...]] = {
    CLASSIFICATION: (),
    MULTI_LABEL: ("multilabel classification", "multi label", "multilabel"),
    DETECTION: ("object detection",),
    INSTANCE_DETECTION: (),
    COUNTING: ("cell counting", "object counting"),
    REGRESSION: (),
    REPORT: ("report", "medical report generation"),
}
"""Task -> other spellings, in lower case, with spaces for ``_`` and ``-``."""

BOX_TASKS = (DETECTION, INSTANCE_DETECTION)
"""Tasks whose answers contain boxes, x1 y1 x2 y2."""

SPLITS = ("train", "val", "test")
MISSPELT = 0.8
"""Least similarity, 0 to 1, at which an unknown task name counts as a misspelt known one."""


@dataclass(frozen=True)
class FlareDataset:
    """A data set of FLARE25."""

    name: str
    category: str
    """Folder between the split and the data set in ``organized_dataset``."""
    modality: str
    task_types: tuple[str, ...]
    """The first is used if a record's own task cannot be recognised."""
    has_multi_image: bool = False
    """True if every case has several images by design. Informative only: other sets have such records too."""
    is_starter: bool = False
    """True for the five sets that are converted by default."""
    description: str = ""


def _dataset(
    name: str, category: str, *tasks: str, multi: bool = False, starter: bool = False, description: str
) -> tuple[str, FlareDataset]:
    return name, FlareDataset(name, category, MODALITIES[category], tasks, multi, starter, description)


MODALITIES = {
    "Retinography": "retinography",
    "Ultrasound": "ultrasound",
    "Xray": "x-ray",
    "Clinical": "clinical photography",
    "Microscopy": "microscopy",
    "Endoscopy": "endoscopy",
    "Dermatology": "dermatology",
    "Mammography": "mammography",
}
"""Category folder -> modality. The records' own modality field is spelt too inconsistently."""

FLARE_DATASETS: dict[str, FlareDataset] = dict(
    [
        _dataset(
            "neojaundice",
            "Clinical",
            CLASSIFICATION,
            multi=True,
            starter=True,
            description="Jaundice of newborns from three photographs of the skin",
        ),
        _dataset(
            "retino", "Retinography", CLASSIFICATION, starter=True, description="Grade of diabetic retinopathy, A to E"
        ),
        _dataset("BUSI-det", "Ultrasound", DETECTION, starter=True, description="Boxes of breast lesions"),
        _dataset(
            "boneresorption",
            "Xray",
            REGRESSION,
            CLASSIFICATION,
            starter=True,
            description="Resorption of bone, in percent",
        ),
        _dataset(
            "bone_marrow", "Microscopy", CLASSIFICATION, starter=True, description="Type of a bone marrow cell, A to K"
        ),
        _dataset("fundus", "Retinography", CLASSIFICATION, description="Findings of the fundus"),
        _dataset("BUS-UCLM-det", "Ultrasound", DETECTION, description="Boxes of breast lesions"),
        _dataset("BUSI", "Ultrasound", CLASSIFICATION, description="Normal, benign or malignant breast"),
        _dataset("BUS-UCLM", "Ultrasound", CLASSIFICATION, description="Normal, benign or malignant breast"),
        _dataset(
            "iugc",
            "Ultrasound",
            CLASSIFICATION,
            DETECTION,
            REGRESSION,
            description="Labour: standard plane, heads, angle",
        ),
        _dataset("dental", "Xray", CLASSIFICATION, description="Findings of teeth, A to F"),
        _dataset("periapical", "Xray", MULTI_LABEL, description="Findings around the root, joined by ';'"),
        _dataset("IU_XRay", "Xray", REPORT, description="Reports of chest x-rays"),
        _dataset("chestdr", "Xray", MULTI_LABEL, CLASSIFICATION, description="Findings of the chest, joined by ','"),
        _dataset(
            "chromosome", "Microscopy", INSTANCE_DETECTION, COUNTING, description="Boxes of chromosomes, by their kind"
        ),
        _dataset("neurips22cell", "Microscopy", COUNTING, description="Number of cells"),
        _dataset("endo", "Endoscopy", CLASSIFICATION, description="Findings of endoscopy; few records"),
        _dataset("bcn20000", "Dermatology", CLASSIFICATION, description="Lesions of the skin"),
        _dataset(
            "CMMD", "Mammography", CLASSIFICATION, description="Findings of the breast, answered by the class's name"
        ),
    ]
)
"""Name -> data set; the five starter sets come first."""


def register_flare_dataset(dataset: FlareDataset) -> None:
    """Add a data set in the same folder layout, or replace one of the same name.

    Raises:
        DataError: it has no task, or an unknown one.
    """
    if not dataset.task_types:
        raise DataError(f"FLARE data set {dataset.name}: task_types is empty. Known: {', '.join(TASKS)}.")
    for task in dataset.task_types:
        if task not in TASKS:
            raise DataError(f"FLARE data set {dataset.name}: unknown task {task!r}.{hint(task, TASKS)}")
    FLARE_DATASETS[dataset.name] = dataset


def read_catalog(path: str | Path) -> list[str]:
    """Register the data sets that a YAML or JSON file declares, and return their names.

    Example:
        ``polyp: {category: Endoscopy, task_types: [detection], description: Boxes of polyps}``

    Raises:
        DataError: the file cannot be read, or an entry is malformed.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"catalog {path} cannot be read: {one_line(error, 200)}.") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise DataError(f"catalog {path} must map names to {{category: ..., task_types: [...]}}.")
    keys = [field.name for field in fields(FlareDataset) if field.name != "name"]
    for name, entry in entries.items():
        for key in entry:
            if key not in keys:
                raise DataError(f"catalog {path}: {name}: unknown key {key!r}.{hint(str(key), keys)}")
        if not isinstance(entry.get("category"), str) or not isinstance(entry.get("task_types"), list):
            raise DataError(f"catalog {path}: {name} needs category (a folder) and task_types (a list).")
        entry = {"modality": MODALITIES.get(entry["category"]) or entry["category"].lower()} | entry
        register_flare_dataset(FlareDataset(str(name), **entry | {"task_types": tuple(entry["task_types"])}))
    return [str(name) for name in entries]


def select(*, category: str | None = None, task: str | None = None, starter: bool | None = None) -> list[str]:
    """Return the names of matching data sets, in the catalog's order; None matches everything.

    Example:
        ``",".join(registry_name(name) for name in select(category="Xray"))`` is a value for ``data.train``.
    """
    return [
        name
        for name, dataset in FLARE_DATASETS.items()
        if (category is None or dataset.category == category)
        and (task is None or task in dataset.task_types)
        and (starter is None or dataset.is_starter == starter)
    ]


def find_datasets(names: Iterable[str]) -> list[str]:
    """Resolve names, in any case or as registered for recipes, and ``starter`` and ``all``, to catalog names.

    Raises:
        DataError: no name is given, or one is unknown; the message suggests a similar one.
    """
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not names:
        raise DataError("no FLARE data set is named. Give names, starter or all.")
    spelled = {key.lower(): name for name in FLARE_DATASETS for key in (registry_name(name), name)}
    groups = {"starter": select(starter=True), "all": list(FLARE_DATASETS)}
    found: dict[str, None] = {}
    for name in names:
        key = name.lower()
        if key not in groups and key not in spelled:
            close = get_close_matches(key, [*spelled, *groups], n=1)
            meant = spelled[close[0]] if close and close[0] in spelled else key
            raise DataError(
                f"unknown FLARE data set {name!r}.{hint(meant, [*FLARE_DATASETS, *groups])} "
                "Declare your own with --catalog FILE."
            )
        found.update(dict.fromkeys(groups[key] if key in groups else [spelled[key]]))
    return list(found)


def find_task(spelled: Any, dataset: FlareDataset) -> tuple[str, bool]:
    """Return the task that a record names, and True if its spelling was recognised.

    Case, ``_``, ``-`` and typing errors do not matter. Anything else counts as the data set's first task.

    Example:
        ``"Multi_label-Clasification"`` is ``("multi-label classification", True)``.
    """
    known = {_plain(name): task for task, others in TASKS.items() for name in (task, *others)}
    name = _plain(spelled) if isinstance(spelled, str) else ""
    close = [name] if name in known else get_close_matches(name, known, n=1, cutoff=MISSPELT)
    return (known[close[0]], True) if close else (dataset.task_types[0], False)


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").replace("-", " ").split())


def registry_name(name: str, split: str = "train") -> str:
    """Return the name for recipes: ``BUSI-det`` is ``flare_busi_det``, its validation split ``flare_busi_det_val``."""
    return f"flare_{name.lower().replace('-', '_')}" + ("" if split == "train" else f"_{split}")


def converted_file(name: str, split: str) -> str:
    """Return the file name of a converted split: ``BUSI-det_train.json``."""
    return f"{name}_{split}.json"


def register_converted(folder: str | Path = "converted_data", names: Iterable[str] | None = None) -> list[str]:
    """Register the converted files of a folder for recipes and selections. `DATASETS` lists the training splits only.

    Args:
        names: data sets that must exist; None registers all that do.

    Returns:
        The registered names: all training splits in the catalog's order, then ``_val``, then ``_test``.

    Raises:
        DataError: a named data set, or every file, is missing.
    """
    root = Path(folder).absolute()
    asked = list(FLARE_DATASETS) if names is None else find_datasets(names)
    files = {(split, name): root / converted_file(name, split) for split in SPLITS for name in asked}
    there = {key: path for key, path in files.items() if path.is_file()}
    missing = [name for name in asked if not any(key[1] == name for key in there)] if names is not None else []
    if missing or not there:
        raise DataError(
            f"{folder} has no converted data of {', '.join(missing) or 'any FLARE data set'}. "
            f"Run: qwenvl-ft convert flare --datasets {' '.join(missing) or 'starter'} --output_dir {folder}"
        )
    for (split, name), path in there.items():
        register_dataset(registry_name(name, split), str(path), listed=split == "train")
    return [registry_name(name, split) for split, name in there]
