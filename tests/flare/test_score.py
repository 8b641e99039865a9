"""Scores of the synthetic tree: compared by hand, joined by image and question, nothing dropped silently."""

import json
import re

import pytest
from flare_cases import CASES, MORE, Case

from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.catalog import FLARE_DATASETS, TASKS
from qwenvl_ft.flare.convert import main as convert
from qwenvl_ft.flare.score import (
    TASK_METRICS,
    Row,
    dataset_of_file,
    main,
    rows_of_questions,
    rows_of_records,
    score_files,
    score_rows,
)

DETECTION = "detection"


def submission(tree, folder, change=lambda record: record, key="Answer"):
    """Write files of predictions: the questions with ``change(record)`` as the answer."""
    folder.mkdir()
    for name in FLARE_DATASETS:
        records = json.loads(tree.file(name, "validation-hidden", "val_withGT").read_text())
        predictions = [{k: v for k, v in r.items() if k != "Answer"} | {key: change(r)} for r in records]
        (folder / f"{name}_questions_val.json").write_text(json.dumps(predictions))
    return folder


def test_every_task_has_metrics_with_its_primary_number():
    assert set(TASK_METRICS) == set(TASKS)


@pytest.mark.parametrize("key", ["Answer", "prediction"])
def test_right_answers_are_perfect_in_every_data_set(full_tree, tmp_path, capsys, key):
    folder = submission(full_tree, tmp_path / "predictions", lambda record: record["Answer"], key)
    out = tmp_path / "scores" / "summary.json"
    words = ["--predictions", str(folder), "--input_dir", str(full_tree.base), "--output", str(out)]
    assert main(words) == 0
    summary = json.loads(out.read_text())
    assert set(summary["datasets"]) == set(FLARE_DATASETS)
    assert set(summary["tasks"]) == set(TASKS)
    for case in [*CASES, *MORE]:
        metrics = summary["datasets"][case.dataset]["metrics"][case.task]
        metric = TASK_METRICS[case.task]
        assert metrics[metric.primary] == pytest.approx(1.0 if metric.higher_is_better else 0.0)
        assert metrics["n_unparsed"] == 0
    assert summary["datasets"]["iugc"]["metadata"] == {
        "category": "Ultrasound",
        "modality": "ultrasound",
        "tasks": {"regression": 1, "detection": 1, "classification": 1},
        "samples": 3,
        "n_without_reference": 0,
        "n_missing": 0,
        "n_extra": 0,
    }
    assert re.search(r"^chromosome +instance detection +f1@0\.5 +1\.0000 +1 +0$", capsys.readouterr().out, re.MULTILINE)


def test_wrong_answers_are_not_perfect(full_tree, tmp_path):
    """The guard of the test above: the same path with answers that cannot be read."""
    folder = submission(full_tree, tmp_path / "predictions", lambda record: "??")
    summary = score_files(sorted(folder.glob("*.json")), full_tree.base)
    for case in [*CASES, *MORE]:
        metrics = summary["datasets"][case.dataset]["metrics"][case.task]
        metric = TASK_METRICS[case.task]
        if metric.higher_is_better:
            assert metrics[metric.primary] == 0.0
        else:
            assert metrics[metric.primary] == abs(float(case.answer))
        assert metrics["n_unparsed"] == (0 if case.task in ("multi-label classification", "report generation") else 1)


def test_means_by_task_give_each_data_set_the_same_weight():
    """retino: 3 of 4 right in one class; fundus: 0 of 1."""
    rows = [Row("retino", "classification", "A", answer) for answer in ("A", "A", "A", "B")]
    rows += [Row("fundus", "classification", "B", "A")]
    summary = score_rows(rows)["tasks"]["classification"]
    assert summary["balanced_accuracy"] == summary["accuracy"] == pytest.approx((0.75 + 0) / 2)
    assert (summary["datasets"], summary["count"], summary["primary"]) == (2, 5, "balanced_accuracy")


def test_questions_are_joined_by_images_and_text_in_any_order():
    def question(image, text, **more):
        return {"ImageName": image, "Question": text} | more

    references = [
        question("a.png", "One?", Answer="A"),
        question("a.png", "Two?", Answer="B"),
        question(["a.png", "b.png"], "One?", Answer="C"),
        question("a.png", "Three?", Answer=None),
        question("c.png", "One?", Answer="D"),
        question("d.png", "Twice?", Answer="A"),
        question("d.png", "Twice?", Answer="B"),
    ]
    predictions = [
        question(["a.png", "b.png"], "One? ", prediction="C", Answer="wrong"),
        question("a.png", "Two?", prediction="B"),
        question("a.png", "One?", prediction="A"),
        question("a.png", "Three?", prediction="A"),
        question("z.png", "One?", prediction="A"),
        question("d.png", "Twice?", prediction="A"),
        question("d.png", "Twice?", prediction="B"),
    ]
    rows, counts = rows_of_questions(FLARE_DATASETS["retino"], references, predictions)
    assert [(row.reference, row.answer) for row in rows] == [
        ("A", "A"),
        ("B", "B"),
        ("C", "C"),
        ("D", ""),
        ("A", "A"),
        ("B", "B"),
    ]
    assert counts == {"n_without_reference": 1, "n_missing": 1, "n_extra": 1}
    assert score_rows(rows)["datasets"]["retino"]["metrics"]["classification"]["n_unparsed"] == 1


def test_converted_records_are_scored_in_either_unit_of_boxes(full_tree):
    """An intersection over union does not change with the unit, so thousandths score as pixels do."""
    answers = {"pixel": "[[61, 80, 190, 130]]", "norm1000": "[[305, 444, 950, 722]]"}
    likeness = {}
    for unit, answer in answers.items():
        words = ["--input_dir", str(full_tree.base), "--datasets", "BUSI-det", "--coordinates", unit]
        assert convert(words) == 0
        file = full_tree.base.parent / "converted_data" / "BUSI-det_train.json"
        records = json.loads(file.read_text())
        metrics = score_rows(rows_of_records(records, [answer]))["datasets"]["BUSI-det"]["metrics"][DETECTION]
        likeness[unit] = [metrics[f"f1@{threshold}"] for threshold in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert likeness["pixel"] == likeness["norm1000"] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_data_set_is_known_by_the_files_name(tmp_path):
    for file, name in (
        ("BUSI_questions_val.json", "BUSI"),
        ("BUSI-det_questions_val.json", "BUSI-det"),
        ("bus-uclm-det_predictions.json", "BUS-UCLM-det"),
        ("IU_XRay_val.json", "IU_XRay"),
    ):
        assert dataset_of_file(tmp_path / file).name == name
    with pytest.raises(DataError, match="begins with no FLARE data set"):
        dataset_of_file(tmp_path / "predictions.json")


def test_answers_beside_predictions_need_no_second_file(tmp_path):
    file = tmp_path / "neurips22cell_questions_val.json"
    record = {"TaskType": "counting", "ImageName": "a.png", "Question": "How many?", "Answer": 20}
    file.write_text(json.dumps([record | {"prediction": "23 cells"}]))
    assert score_files([file])["datasets"]["neurips22cell"]["metrics"]["counting"]["mae"] == 3
    file.write_text(json.dumps([record]))
    with pytest.raises(DataError, match="no record has a 'prediction' beside its 'Answer'"):
        score_files([file])


def test_errors_of_scoring_are_one_line(tree, tmp_path, capsys):
    tree.fill([Case("BUSI-det", DETECTION, "see the report", DETECTION)], "validation-hidden", "val_withGT")
    records = json.loads(tree.file("BUSI-det", "validation-hidden", "val_withGT").read_text())
    for name in ("BUSI-det", "retino"):
        (tmp_path / f"{name}_questions_val.json").write_text(json.dumps(records))
    base = ["--input_dir", str(tree.base), "--predictions"]
    for words, message in (
        ([str(tmp_path / "BUSI-det_questions_val.json")], "BUSI-det, detection: the reference 'see the report' cannot"),
        ([str(tmp_path / "retino_questions_val.json")], "there are no val questions of retino below"),
        ([str(tree.base)], "there is no .json file in"),
        ([str(tmp_path / "none.json")], "its name begins with no FLARE data set"),
        ([str(tmp_path / "CMMD_questions_val.json")], "No such file"),
    ):
        assert main([*base, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
