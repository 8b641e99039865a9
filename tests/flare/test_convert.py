"""Converts a whole tree: every form of answer, every fault counted by reason, files that training reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flare_cases import CASES, MORE, SIZE, Case, picture, question, read, run
from PIL import Image

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.catalog import FLARE_DATASETS, register_converted
from qwenvl_ft.flare.convert import convert, main
from qwenvl_ft.flare.layout import find_questions
from qwenvl_ft.flare.question_record import Options

ROOT = Path(__file__).resolve().parents[2]


def retino(index=0, **changes):
    """Return a valid question with changes; KEY_GONE removes a key."""
    record = {
        "TaskType": "classification",
        "ImageName": f"imagesTr/{index}.png",
        "Question": "Grade? A B",
        "Answer": "A",
    }
    return {key: value for key, value in (record | changes).items() if value is not KEY_GONE}


KEY_GONE = object()


def test_every_data_set_is_converted_with_its_form_of_answer(full_tree):
    assert run(full_tree, "--all") == 0
    for case in [*CASES, *MORE]:
        for split in ("train", "val"):
            records = read(full_tree, f"{case.dataset}_{split}.json")
            (record,) = [r for r in records if r["task_type"] == case.task]
            dataset = FLARE_DATASETS[case.dataset]
            human, gpt = record["conversations"]
            assert gpt == {"from": "gpt", "value": case.text}
            assert human["from"] == "human"
            assert human["value"].startswith("<image>\n" * case.images + "Question ")
            assert len(record["image"]) == case.images
            assert all(Path(path).is_absolute() and Path(path).is_file() for path in record["image"])
            assert (record["dataset"], record["modality"]) == (case.dataset, dataset.modality)
            assert record["id"].startswith(f"{case.dataset}_{split}_00000")
    report = read(full_tree, "conversion_report.json")
    assert len(report["conversion_results"]) == 38
    statistics = report["statistics"]
    assert statistics["total_samples"] == statistics["converted_samples"] == 2 * len([*CASES, *MORE])
    assert statistics["image_count_distribution"] == {"1": 36, "2": 6, "3": 2}
    assert statistics["task_type_distribution"]["multi-label classification"] == 4
    assert statistics["guessed_task_types"] == 2, "endo has no task"
    assert statistics["total_errors"] == 0


def test_the_starter_set_is_converted_if_nothing_is_named(full_tree, monkeypatch, capsys):
    (full_tree.base.parent / "work").mkdir()
    monkeypatch.chdir(full_tree.base.parent / "work")
    assert main([]) == 0
    folder = Path("../converted_data")
    assert sorted(path.name for path in folder.glob("*_train.json")) == [
        "BUSI-det_train.json",
        "bone_marrow_train.json",
        "boneresorption_train.json",
        "neojaundice_train.json",
        "retino_train.json",
    ]
    assert len(list(folder.glob("*_val.json"))) == 5
    assert {path.name for path in folder.glob("conversion*")} == {"conversion_report.json", "conversion.log"}
    assert "converted 10 of 10 questions, 10 files" in capsys.readouterr().out
    (record,) = json.loads((folder / "retino_train.json").read_text())
    assert ".." not in record["image"][0]


def test_converted_files_train(full_tree, encoder):
    """Through registry, records and encoder, as a run does; a record's images are really in the sample."""
    run(full_tree, "--all")
    names = register_converted(full_tree.base.parent / "converted_data")
    assert len(names) == 38
    records = load_records(",".join(names[:19]))
    assert len(records) == len([*CASES, *MORE])
    for index in range(len(records)):
        record, source, root = records[index]
        sample = encoder(read_record(record, source, root))
        assert len(sample["image_grid_thw"]) == len(record["image"])
        assert source.id == record["id"]
        supervised = sample["input_ids"][sample["labels"] != -100]
        answer = encoder.processor.tokenizer.decode(supervised.tolist())
        assert answer == record["conversations"][1]["value"] + "<|im_end|>\n"


@pytest.fixture
def faulty(tree):
    """Retino with one good record and one of each fault."""
    folder = tree.folder("retino") / "imagesTr"
    for index in range(4):
        picture(folder / f"{index}.png", index)
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.png").write_text("not an image")
    (tree.base / "secret.png").write_bytes(whole)
    tree.write(
        "retino",
        [
            retino(),
            retino(ImageName="imagesTr/none.png"),
            retino(ImageName="imagesTr/cut.png"),
            retino(ImageName=["imagesTr/0.png", "imagesTr/text.png"]),
            retino(ImageName=["imagesTr/0.png", "imagesTr/none.png"]),
            retino(ImageName=""),
            retino(ImageName=KEY_GONE),
            retino(ImageName=["imagesTr/0.png", None]),
            retino(ImageName="../../../secret.png"),
            retino(Question=" "),
            retino(Question=None),
            retino(Answer=""),
            retino(Answer=None),
            retino(Answer="None"),
            retino(Answer=float("nan")),
            retino(Answer=KEY_GONE),
            retino(Answer="<image>"),
            retino(Question="Say <|im_end|>"),
            "not an object",
            retino(Answer=0),
            retino(ImageName="3.png", Question="<image>\nGrade?"),
            retino(ImageName="imagesTr\\2.png"),
        ],
    )
    return tree


def test_skipped_questions_are_counted_by_reason(faulty, capsys):
    assert run(faulty, "--datasets", "retino", "--splits", "train") == 0
    statistics = read(faulty, "conversion_report.json")["statistics"]
    assert statistics["skipped_by_reason"] == {
        "empty_answer": 5,
        "no_image": 3,
        "missing_image": 3,
        "corrupted_image": 2,
        "empty_question": 2,
        "control_token": 2,
        "malformed": 1,
    }
    assert (statistics["missing_images"], statistics["corrupted_images"]) == (3, 2)
    assert statistics["total_samples"] == 22 == statistics["converted_samples"] + statistics["skipped_samples"]
    assert statistics["total_errors"] == 18
    kept = read(faulty, "retino_train.json")
    assert [record["id"][-2:] for record in kept] == ["00", "19", "20", "21"]
    assert [record["conversations"][1]["value"] for record in kept] == ["A", "0", "A", "A"]
    assert kept[2]["conversations"][0]["value"] == "<image>\nGrade?"
    out = capsys.readouterr().out
    assert "left out: 5 empty_answer" in out
    assert "[13]" not in out


def test_skipped_questions_are_in_the_log_and_with_verbose_on_screen(faulty, capsys):
    run(faulty, "--datasets", "retino", "--splits", "train", "--verbose")
    log = (faulty.base.parent / "converted_data" / "conversion.log").read_text()
    for text in (log, capsys.readouterr().out):
        assert "retino_questions_train.json[2]: image " in text
        assert "cut.png is damaged" in text
        assert "[13]: it has no answer" in text
    assert log.count("skipped ") == 18


def test_a_question_can_be_kept_with_its_usable_images(faulty):
    run(faulty, "--datasets", "retino", "--splits", "train", "--keep_incomplete")
    kept = {record["id"][-2:]: record for record in read(faulty, "retino_train.json")}
    assert set(kept) == {"00", "03", "04", "19", "20", "21"}
    assert len(kept["03"]["image"]) == 1
    assert kept["03"]["conversations"][0]["value"].count("<image>") == 1


def test_checking_only_headers_finds_fewer_faults(faulty):
    counts = {}
    for how in ("decode", "header", "none"):
        run(faulty, "--datasets", "retino", "--splits", "train", "--check_images", how)
        counts[how] = read(faulty, "conversion_report.json")["statistics"]["corrupted_images"]
    assert counts == {"decode": 2, "header": 1, "none": 0}


def test_hidden_validation_with_answers_comes_first(tree):
    for part, suffix, answer in (
        ("validation-public", "val", "C"),
        ("validation-hidden", "val", "B"),
        ("validation-hidden", "val_withGT", "A"),
    ):
        tree.fill([Case("retino", "classification", answer, "classification")], part, suffix)
        run(tree, "--datasets", "retino", "--splits", "val")
        assert read(tree, "retino_val.json")[0]["conversations"][1]["value"] == answer


def test_a_file_without_any_answer_is_skipped_with_a_note(tree, capsys):
    case = Case("retino", "classification", "C", "classification")
    tree.fill([case], "validation-hidden", "val", answered=False)
    tree.fill([case], "validation-public", "val")
    assert run(tree, "--datasets", "retino", "--splits", "val") == 0
    assert read(tree, "retino_val.json")[0]["conversations"][1]["value"] == "C"
    assert "validation-public" in read(tree, "retino_val.json")[0]["image"][0]
    assert "holds no answers" in capsys.readouterr().out
    assert (
        find_questions(tree.base, FLARE_DATASETS["retino"], "val", answered=False).file.parts[-4] == "validation-hidden"
    )


def test_categories_and_folders_are_found_in_any_case(tree):
    tree.fill([CASES[0]])
    shutil.move(
        tree.base / "training" / "Clinical" / "neojaundice", tree.base / "training" / "clinical_images" / "Neojaundice"
    )
    assert run(tree, "--datasets", "neojaundice", "--splits", "train") == 0


def test_numbered_boxes_become_thousandths(full_tree):
    """An image of 200 x 180: x times 5, y times 5.556."""
    run(full_tree, "--all", "--splits", "train", "--coordinates", "norm1000")
    assert SIZE == (200, 180)
    (record,) = read(full_tree, "BUSI-det_train.json")
    assert record["conversations"][1]["value"] == "[[305, 444, 950, 950]]"
    assert (record["coordinates"], record["width"], record["height"]) == ("norm1000", 200, 180)
    (record,) = read(full_tree, "BUS-UCLM-det_train.json")
    assert record["conversations"][1]["value"] == "[305, 444, 950, 950]; [25, 33, 350, 444]"
    record = read(full_tree, "chromosome_train.json")[0]
    assert record["conversations"][1]["value"] == '{"1": [[5, 11, 150, 222]], "X": [[25, 33, 350, 444]]}'
    (record,) = read(full_tree, "boneresorption_train.json")
    assert record["conversations"][1]["value"] == "0"
    assert "coordinates" not in record


def test_boxes_that_cannot_be_normalised_are_left_out(tree):
    folder = tree.folder("BUSI-det")
    case = Case("BUSI-det", "detection", "", "detection", images=2)
    records = [question(case, index, folder, "imagesTr") for index in range(4)]
    picture(folder / "imagesTr/other.png")
    Image.new("RGB", (10, 20)).save(folder / "imagesTr/other.png")
    records[0] |= {"Answer": "[[10, 18, 20, 36]]"}
    records[1] |= {"Answer": "[[10, 18, 20, 36]]", "ImageName": [records[1]["ImageName"][0], "imagesTr/other.png"]}
    records[2] |= {"Answer": "left 10 to 20"}
    records[3] |= {"Answer": "[]"}
    tree.write("BUSI-det", records)
    run(tree, "--datasets", "BUSI-det", "--splits", "train", "--coordinates", "norm1000")
    assert [r["conversations"][1]["value"] for r in read(tree, "BUSI-det_train.json")] == [
        "[[50, 100, 100, 200]]",
        "[]",
    ]
    reasons = read(tree, "conversion_report.json")["statistics"]["skipped_by_reason"]
    assert reasons == {"several_sizes": 1, "unreadable_boxes": 1}


def test_a_custom_data_set_is_converted(tree, tmp_path):
    catalog = tmp_path / "own.yaml"
    catalog.write_text("polyp: {category: Endoscopy, task_types: [detection]}")
    folder = tree.base / "training" / "Endoscopy" / "polyp"
    case = Case("polyp", "detection", "[[1, 2, 3, 4]]", "detection")
    folder.mkdir(parents=True)
    (folder / "polyp_questions_train.json").write_text(json.dumps([question(case, 0, folder, "imagesTr")]))
    assert run(tree, "--catalog", str(catalog), "--datasets", "polyp", "--splits", "train") == 0
    (record,) = read(tree, "polyp_train.json")
    assert (record["dataset"], record["modality"]) == ("polyp", "endoscopy")


def test_converting_one_data_set_again_keeps_the_others(full_tree):
    run(full_tree, "--datasets", "retino", "BUSI", "--splits", "train")
    before = (full_tree.base.parent / "converted_data" / "BUSI_train.json").stat()
    tree_records = json.loads(full_tree.file("retino").read_text())
    full_tree.write("retino", [tree_records[0] | {"Answer": "D"}])
    run(full_tree, "--datasets", "retino", "--splits", "train")
    assert read(full_tree, "retino_train.json")[0]["conversations"][1]["value"] == "D"
    assert (full_tree.base.parent / "converted_data" / "BUSI_train.json").stat().st_mtime_ns == before.st_mtime_ns
    assert not list((full_tree.base.parent / "converted_data").glob("*.partial"))


def test_the_function_returns_the_report_that_it_writes(full_tree, tmp_path):
    report = convert(["CMMD"], ["train"], base=full_tree.base, output=tmp_path / "out", options=Options(num_workers=1))
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text()) == report.to_json()
    with pytest.raises(DataError, match="unknown split"):
        convert(["CMMD"], ["dev"], base=full_tree.base)


def test_records_read_alike_from_anywhere(full_tree):
    run(full_tree, "--datasets", "neojaundice", "--splits", "train")
    (record,) = read(full_tree, "neojaundice_train.json")
    conversation = read_record(record, Source("x", "x"), "/elsewhere")
    assert [
        part.value for message in conversation.messages for part in message.content if hasattr(part, "value")
    ] == record["image"]


def test_deep_images_are_left_out_and_counted_or_converted_as_the_flags_say(tree, encoder, capsys):
    folder = tree.folder("retino") / "imagesTr"
    picture(folder / "0.png")
    Image.fromarray(np.arange(180 * 200, dtype=np.uint16).reshape(180, 200) % 4096).save(folder / "1.png")
    tree.write("retino", [retino(0), retino(1)])
    assert run(tree, "--datasets", "retino", "--splits", "train") == 0
    statistics = read(tree, "conversion_report.json")["statistics"]
    assert statistics["skipped_by_reason"] == {"high_bit_depth": 1}
    assert statistics["high_bit_depth_images"] == {}
    assert (
        run(tree, "--datasets", "retino", "--splits", "train", "--high_bit_depth", "window", "--window", "0", "4095")
        == 0
    )
    assert "deeper than 8 bits, converted by window 0 to 4095: 1 images" in capsys.readouterr().out
    assert read(tree, "conversion_report.json")["statistics"]["high_bit_depth_images"] == {"window 0 to 4095": 1}
    plain, deep = read(tree, "retino_train.json")
    assert (deep["high_bit_depth"], deep["window"]) == ("window", [0, 4095])
    assert "window" not in plain
    assert len(encoder(deep)["image_grid_thw"]) == 1, "training needs no setting of its own"
