"""Which data sets FLARE25 has, what is asked in each, and under which names recipes find them."""

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
"""Task -> its other names, in lower case, with spaces for ``_`` and ``-``."""

BOX_TASKS = (DETECTION, INSTANCE_DETECTION)
"""Tasks whose answers hold boxes, x1 y1 x2 y2."""

SPLITS = ("train", "val", "test")
MISSPELT = 0.8
"""How similar, from 0 to 1, an unknown task name must be to a known one to be taken for it."""


@dataclass(frozen=True)
class FlareDataset:
    """One data set, and the folder name of its category in ``organized_dataset``."""

    name: str
    category: str
    """Folder between the split and the data set."""
    modality: str
    task_types: tuple[str, ...]
    """The first is taken where a record's own task cannot be made out."""
    has_multi_image: bool = False
    """Several views to a case by design. Others have such records too, so nothing depends on it."""
    is_starter: bool = False
    """One of the five that are converted if none is named."""
    description: str = ""


def _dataset(name: str, category: str, *tasks: str, multi: bool = False, starter: bool = False, told: str) -> Any:
    return name, FlareDataset(name, category, MODALITIES[category], tasks, multi, starter, told)


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
"""Category folder -> modality. Records spell their own in too many ways to be relied on."""

FLARE_DATASETS: dict[str, FlareDataset] = dict(
    [
        _dataset(
            "neojaundice",
            "Clinical",
            CLASSIFICATION,
            multi=True,
            starter=True,
            told="Jaundice of newborns from three photographs of the skin",
        ),
        _dataset("retino", "Retinography", CLASSIFICATION, starter=True, told="Grade of diabetic retinopathy, A to E"),
        _dataset("BUSI-det", "Ultrasound", DETECTION, starter=True, told="Boxes of breast lesions"),
        _dataset(
            "boneresorption", "Xray", REGRESSION, CLASSIFICATION, starter=True, told="Resorption of bone, in percent"
        ),
        _dataset("bone_marrow", "Microscopy", CLASSIFICATION, starter=True, told="Type of a bone marrow cell, A to K"),
        _dataset("fundus", "Retinography", CLASSIFICATION, told="Findings of the fundus"),
        _dataset("BUS-UCLM-det", "Ultrasound", DETECTION, told="Boxes of breast lesions"),
        _dataset("BUSI", "Ultrasound", CLASSIFICATION, told="Normal, benign or malignant breast"),
        _dataset("BUS-UCLM", "Ultrasound", CLASSIFICATION, told="Normal, benign or malignant breast"),
        _dataset(
            "iugc", "Ultrasound", CLASSIFICATION, DETECTION, REGRESSION, told="Labour: standard plane, heads, angle"
        ),
        _dataset("dental", "Xray", CLASSIFICATION, told="Findings of teeth, A to F"),
        _dataset("periapical", "Xray", MULTI_LABEL, told="Findings around the root, joined by ';'"),
        _dataset("IU_XRay", "Xray", REPORT, told="Reports of chest x-rays"),
        _dataset("chestdr", "Xray", MULTI_LABEL, CLASSIFICATION, told="Findings of the chest, joined by ','"),
        _dataset("chromosome", "Microscopy", INSTANCE_DETECTION, COUNTING, told="Boxes of chromosomes, by their kind"),
        _dataset("neurips22cell", "Microscopy", COUNTING, told="Number of cells"),
        _dataset("endo", "Endoscopy", CLASSIFICATION, told="Findings of endoscopy; few records"),
        _dataset("bcn20000", "Dermatology", CLASSIFICATION, told="Lesions of the skin"),
        _dataset("CMMD", "Mammography", CLASSIFICATION, told="Findings of the breast, answered by the class's name"),
    ]
)
"""Name -> data set; the five of the starter set come first."""


def register_flare_dataset(dataset: FlareDataset) -> None:
    """Add a data set of one's own that lies in the same layout; a known name is replaced.

    Raises:
        DataError: it names no task, or a task that does not exist.
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
        DataError: the file or an entry is not one.
    """
    try:
        told = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"catalog {path} cannot be read: {one_line(error, 200)}.") from None
    if not isinstance(told, dict) or not all(isinstance(entry, dict) for entry in told.values()):
        raise DataError(f"catalog {path} must map names to {{category: ..., task_types: [...]}}.")
    keys = [field.name for field in fields(FlareDataset) if field.name != "name"]
    for name, entry in told.items():
        for key in entry:
            if key not in keys:
                raise DataError(f"catalog {path}: {name}: unknown key {key!r}.{hint(str(key), keys)}")
        if not isinstance(entry.get("category"), str) or not isinstance(entry.get("task_types"), list):
            raise DataError(f"catalog {path}: {name} needs category (a folder) and task_types (a list).")
        entry = {"modality": MODALITIES.get(entry["category"]) or entry["category"].lower()} | entry
        register_flare_dataset(FlareDataset(str(name), **entry | {"task_types": tuple(entry["task_types"])}))
    return [str(name) for name in told]


def select(*, category: str | None = None, task: str | None = None, starter: bool | None = None) -> list[str]:
    """Names of the data sets that fit, in the catalog's order; None does not care.

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
    """Names as the catalog has them, each once: of data sets in any case, as registered, or ``starter`` or ``all``.

    Raises:
        DataError: a name is not there, and the message says which is close; or none is given.
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
                "Declare one of your own with --catalog FILE."
            )
        found.update(dict.fromkeys(groups[key] if key in groups else [spelled[key]]))
    return list(found)


def find_task(spelled: Any, dataset: FlareDataset) -> tuple[str, bool]:
    """The task that a record means, and whether its spelling said so.

    Case, ``_``, ``-`` and slips of the pen do not matter. What is no task at all is the data set's first.

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
    """The name in recipes: ``BUSI-det`` is ``flare_busi_det``, its validation split ``flare_busi_det_val``."""
    return f"flare_{name.lower().replace('-', '_')}" + ("" if split == "train" else f"_{split}")


def converted_file(name: str, split: str) -> str:
    """File name of a converted split: ``BUSI-det_train.json``."""
    return f"{name}_{split}.json"


def register_converted(folder: str | Path = "converted_data", names: Iterable[str] | None = None) -> list[str]:
    """Register the converted files of a folder for recipes and selections.

    Args:
        names: data sets that must be there; None registers those that are.

    Returns:
        The registered names: all training splits in the catalog's order, then ``_val``, then ``_test``.

    Raises:
        DataError: the folder has no such file.
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
        register_dataset(registry_name(name, split), str(path))
    return [registry_name(name, split) for split, name in there]
