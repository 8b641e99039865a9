"""What a conversion finds by name, what it does after a malformed file, and what its report keeps."""

import json

import pytest
from flare_cases import CASES, picture, read, run

from qwenvl_ft.flare.conversion_report import Report, summed
from qwenvl_ft.flare.question_record import Tally


def asked(name, **changes):
    return {"TaskType": "classification", "ImageName": name, "Question": "Grade?", "Answer": "A"} | changes


@pytest.fixture
def retino(tree):
    """A function that converts questions about images of retino; it returns the records and the statistics."""

    def converted(questions, *images):
        for seed, name in enumerate(images):
            picture(tree.folder("retino") / name, seed)
        tree.write("retino", questions)
        code = run(tree, "--datasets", "retino", "--splits", "train")
        records = read(tree, "retino_train.json") if code == 0 else []
        return records, read(tree, "conversion_report.json")["statistics"]

    return converted


def test_a_name_with_a_folder_never_gets_another_picture_of_the_same_name(retino, capsys):
    """The absent picture of one patient is not replaced by another's, with the first one's label."""
    names = ["imagesTr/D1-0003/1-1.png", "D1-0003/1-1.png", "imagesVal/1-1.png", "imagesTr/D1-0002/1-1.png"]
    records, statistics = retino([asked(name) for name in names], "imagesTr/1-1.png", "imagesTr/D1-0002/1-1.png")
    assert [record["image_name"] for record in records] == ["imagesTr/D1-0002/1-1.png"]
    assert records[0]["image"][0].endswith("imagesTr/D1-0002/1-1.png")
    assert statistics["skipped_by_reason"] == {"missing_image": 3}
    assert statistics["images_found_by_name"] == 0
    assert "found by name" not in capsys.readouterr().out


def test_a_bare_name_is_found_in_one_folder_counted_and_never_chosen_among_several(retino, capsys):
    names = ["one.png", "./one.png", "two.png", "here.png", "none.png"]
    images = ("imagesTr/one.png", "imagesTr/two.png", "images/two.png", "here.png", "images/here.png")
    records, statistics = retino([asked(name) for name in names], *images)
    found = [record["image"][0].partition("retino/")[2] for record in records]
    assert found == ["imagesTr/one.png", "imagesTr/one.png", "here.png"]
    assert statistics["images_found_by_name"] == 2
    assert statistics["skipped_by_reason"] == {"ambiguous_image": 1, "missing_image": 1}
    assert (statistics["ambiguous_images"], statistics["missing_images"]) == (1, 1)
    out = capsys.readouterr().out
    assert "images named without their folder, found by name: 2" in out


def test_an_ambiguous_name_is_explained_in_the_log(retino, tree):
    retino([asked("two.png"), asked("imagesTr/two.png")], "imagesTr/two.png", "images/two.png")
    log = (tree.base.parent / "converted_data" / "conversion.log").read_text()
    assert "image two.png is in imagesTr and images of" in log


def test_one_malformed_file_does_not_stop_the_others(full_tree, capsys):
    full_tree.file("BUSI-det").write_text('[{"ImageName": ')
    assert run(full_tree, "--all") == 1
    streams = capsys.readouterr()
    assert "error: BUSI-det train: " in streams.err
    assert "BUSI-det_questions_train.json: not valid JSON" in streams.err
    assert "nothing was converted of" not in streams.err, "its validation split was"
    folder = full_tree.base.parent / "converted_data"
    assert len(list(folder.glob("*_train.json"))) == 18
    assert len(list(folder.glob("*_val.json"))) == 19
    report = read(full_tree, "conversion_report.json")
    assert [(entry["dataset"], entry["split"]) for entry in report["failed"]] == [("BUSI-det", "train")]
    assert len(report["conversion_results"]) == 37
    full_tree.fill([case for case in CASES if case.dataset == "BUSI-det"])
    assert run(full_tree, "--datasets", "BUSI-det") == 0
    report = read(full_tree, "conversion_report.json")
    assert (len(report["conversion_results"]), report["failed"]) == (38, [])


def test_converting_one_set_again_keeps_the_report_of_the_others(full_tree, capsys):
    assert run(full_tree, "--all") == 0
    before = read(full_tree, "conversion_report.json")
    questions = json.loads(full_tree.file("retino").read_text())
    full_tree.write("retino", [*questions, asked("imagesTr/none.png")])
    capsys.readouterr()
    assert run(full_tree, "--datasets", "retino", "--splits", "train") == 0
    after = read(full_tree, "conversion_report.json")
    assert "converted 1 of 2 questions, 1 files" in capsys.readouterr().out, "the screen shows this conversion"

    def others(report):
        entries = {(entry["dataset"], entry["split"]): entry for entry in report["conversion_results"]}
        return entries.pop(("retino", "train")), entries

    assert others(before)[1] == others(after)[1]
    assert others(after)[0]["skipped"] == {"missing_image": 1}
    statistics = after["statistics"]
    assert statistics["total_samples"] == before["statistics"]["total_samples"] + 1
    assert statistics["converted_samples"] == before["statistics"]["converted_samples"]
    assert statistics["skipped_by_reason"] == {"missing_image": 1}
    log = (full_tree.base.parent / "converted_data" / "conversion.log").read_text()
    assert "neojaundice train" in log
    assert "none.png is not below" in log


def test_the_sums_of_statistics_are_those_of_one_tally():
    one, two = Tally(total_samples=3, converted_samples=2), Tally(total_samples=5, converted_samples=4, guessed_tasks=1)
    one.skipped["no_image"] += 1
    two.skipped.update(no_image=2, empty_answer=5)
    one.image_counts["2"] += 1
    two.image_counts["1"] += 1
    total = summed([one.to_json(), two.to_json()])
    assert (total["total_samples"], total["converted_samples"], total["guessed_task_types"]) == (8, 6, 1)
    assert list(total["skipped_by_reason"].items()) == [("empty_answer", 5), ("no_image", 3)]
    assert list(total["image_count_distribution"].items()) == [("1", 1), ("2", 1)]
    assert set(total) == set(Tally().to_json())


@pytest.mark.parametrize("content", ["", "[]", '{"statistics": {}}', '{"conversion_results": [{"samples": 3}]}'])
def test_a_report_of_another_form_is_begun_anew(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert Report.read(tmp_path / "r.json").to_json() == Report().to_json()
