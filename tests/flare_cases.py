"""A small synthetic FLARE tree: every data set with its form of answer, two splits, and every kind of fault."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenvl_ft.flare.catalog import FLARE_DATASETS
from qwenvl_ft.flare.convert import main

IMAGE_FOLDER = {"training": "imagesTr", "validation-hidden": "imagesVal", "validation-public": "imagesVal"}


@dataclass(frozen=True)
class Case:
    """One question of a data set, and what its record must hold."""

    dataset: str
    spelled: str
    answer: object
    task: str
    images: int = 1
    written: str = ""
    """The answer in the record, where it is not the answer's own text."""

    @property
    def text(self) -> str:
        return self.written or str(self.answer)


CASES = [
    Case("neojaundice", "classification", "B", "classification", images=3),
    Case("retino", "Clasification", "E", "classification"),
    Case("BUSI-det", "Detecton", "[[61, 80, 190, 171]]", "detection"),
    Case("boneresorption", "regression", 0, "regression"),
    Case("bone_marrow", "CLASSIFICATION", "K", "classification"),
    Case("fundus", "Classification ", "A", "classification"),
    Case("BUS-UCLM-det", "detection", "[61, 80, 190, 171]; [5, 6, 70, 80]", "detection"),
    Case("BUSI", "classification", "C", "classification"),
    Case("BUS-UCLM", "classification", " A ", "classification", written="A"),
    Case("iugc", "Regression", 101.5, "regression"),
    Case("dental", "classification", "F", "classification"),
    Case("periapical", "Multi-label Classification", "Caries, deep; Root piece", "multi-label classification"),
    Case("IU_XRay", "Report_Generation", "No acute disease.\nHeart size normal.", "report generation"),
    Case("chestdr", "Multi_Label-Clasification", "edema, nodule", "multi-label classification"),
    Case("chromosome", "instance_detection", {"1": [[1, 2, 30, 40]], "X": [[5, 6, 70, 80]]}, "instance detection",
         written='{"1": [[1, 2, 30, 40]], "X": [[5, 6, 70, 80]]}'),
    Case("neurips22cell", "Cell Counting", 0, "counting"),
    Case("endo", "", "P", "classification", images=2),
    Case("bcn20000", "Classification", "G", "classification", images=2),
    Case("CMMD", "classification", "Luminal b", "classification", images=2),
]  # fmt: skip
"""One for each data set."""
MORE = [
    Case("iugc", "Detection", "[[5, 6, 70, 80]]", "detection"),
    Case("iugc", "classification", "A", "classification"),
    Case("chromosome", "Counting", "46", "counting"),
]
"""Other tasks of the same data sets."""

SIZE = (200, 180)


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (seed * 37 % 256, seed * 91 % 256, 90)).save(path)


def question(case, index, folder, images):
    names = [f"{images}/{case.dataset}_{index}_{view}.png" for view in range(case.images)]
    for view, name in enumerate(names):
        picture(folder / name, index + view)
    return {
        "TaskType": case.spelled,
        "Modality": "whatever",
        "ImageName": names if case.images > 1 else names[0],
        "Question": f"Question {index} about {case.dataset}?\nA. yes B. no",
        "Answer": case.answer,
        "Split": "train",
    }


class Tree:
    """An ``organized_dataset`` that tests add to."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def folder(self, name, part="training"):
        return self.base / part / FLARE_DATASETS[name].category / name

    def file(self, name, part="training", suffix="train"):
        return self.folder(name, part) / f"{name}_questions_{suffix}.json"

    def write(self, name, records, part="training", suffix="train"):
        file = self.file(name, part, suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return file

    def fill(self, cases, part="training", suffix="train", answered=True):
        for name in dict.fromkeys(case.dataset for case in cases):
            chosen = [case for case in cases if case.dataset == name]
            records = [question(case, i, self.folder(name, part), IMAGE_FOLDER[part]) for i, case in enumerate(chosen)]
            if not answered:
                records = [record | {"Answer": None} for record in records]
            self.write(name, records, part, suffix)


def run(tree, *arguments):
    """Run ``qwenvl-ft convert flare`` on a tree; return the exit code."""
    return main(["--input_dir", str(tree.base), *arguments])


def read(tree, name):
    """Read a JSON file that the conversion wrote."""
    return json.loads((tree.base.parent / "converted_data" / name).read_text())
