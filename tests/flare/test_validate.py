"""Errors in converted files are found and named and give exit code 1; oddities are only warnings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from flare_cases import picture

from qwenvl_ft.cli.main import main as command
from qwenvl_ft.flare.convert import main as convert
from qwenvl_ft.flare.validate import validate_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def good(tmp_path):
    """A function that makes a good record, with changes."""
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png", 1)

    def make(question="<image>\nGrade?", answer="A", image="a.png", **changes):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"image": [str(tmp_path / "images" / image)], "conversations": turns} | changes

    return make


def found(tmp_path, records):
    """(kind, index) of the errors, then of the warnings."""
    path = tmp_path / "retino_train.json"
    path.write_text(json.dumps(records))
    findings = validate_file(path)
    sides = (findings.errors, findings.warnings)
    return tuple([(item["kind"], int(item["record"].rpartition("[")[2][:-1])) for item in side] for side in sides)


def test_converted_files_are_valid(full_tree, capsys):
    assert convert(["--input_dir", str(full_tree.base), "--all"]) == 0
    folder = full_tree.base.parent / "converted_data"
    assert command(["convert", "flare-validate", "--input_dir", str(folder)]) == 0
    report = json.loads((folder / "validation_report.json").read_text())
    assert report["summary"] == {
        "valid": True,
        "files": 38,
        "samples": 44,
        "errors": 0,
        "warnings": 0,
        "by_kind": {},
    }
    assert command(["convert", "flare-validate", "--input_dir", str(folder)]) == 0, "its own reports are not data"
    assert "44 samples, 0 errors, 0 warnings" in capsys.readouterr().out


def test_every_fault_of_a_record_is_an_error(tmp_path, good):
    whole = (tmp_path / "images/a.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    one = good()["conversations"]
    errors, warnings = found(
        tmp_path,
        [
            good(),
            good(image="none.png"),
            good(image="cut.png"),
            good(question="Grade?") | {"image": []},
            good() | {"image": 5},
            good(question="Grade?"),
            good(question="<image><image>"),
            good(answer="<image>"),
            good(conversations=one * 2),
            good(conversations=one[::-1]),
            good(conversations="Grade?"),
            good(conversations=[{"from": "human"}, {"from": "gpt", "value": "A"}]),
            {"image": good()["image"]},
            "text",
        ],
    )
    assert errors == [
        ("missing_image", 1),
        ("corrupted_image", 2),
        ("image", 3),
        ("image", 4),
        ("tags", 4),
        ("tags", 5),
        ("tags", 6),
        ("tags", 7),
        ("turns", 8),
        ("turns", 9),
        ("structure", 10),
        ("structure", 11),
        ("structure", 12),
        ("structure", 13),
    ]
    assert warnings == []


def test_a_duplicate_has_the_same_images_too(tmp_path, good):
    """The same question about another image is no duplicate."""
    errors, warnings = found(tmp_path, [good(), good(image="b.png"), good(), good(answer="B"), good(answer=" ")])
    assert errors == []
    assert warnings == [("duplicate", 2), ("empty_answer", 4)]


def test_relative_images_start_beside_the_file(tmp_path, good):
    assert found(tmp_path, [good() | {"image": "images/a.png"}]) == ([], [])
    assert found(tmp_path, [good() | {"image": "a.png"}])[0] == [("missing_image", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("{}", "a file of records is a JSON list"), ("[]", "the list is empty")],
)
def test_a_file_that_is_not_a_list_of_records_is_an_error(tmp_path, capsys, content, message):
    (tmp_path / "retino_train.json").write_text(content)
    assert command(["convert", "flare-validate", "--converted_dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


def test_faults_are_printed_and_reported_and_give_exit_code_1(tmp_path, good, capsys):
    path = tmp_path / "retino_train.json"
    path.write_text(json.dumps([good(), good(image="none.png")]))
    report = tmp_path / "out.json"
    words = ["convert", "flare-validate", "--files", str(path), "--save_report", str(report)]
    assert command(words) == 1
    out = capsys.readouterr().out
    assert f"FAILED {path}: 2 samples" in out
    assert f"missing_image: {path}[1]: {tmp_path}/images/none.png does not exist" in out
    written = json.loads(report.read_text())
    assert written["summary"]["by_kind"] == {"missing_image": 1}
    assert written["files"][0]["errors"][0]["record"] == f"{path}[1]"
    path.write_text(json.dumps([good()]))
    assert command(words) == 0


def test_a_name_within_the_folder_is_enough(tmp_path, good):
    (tmp_path / "retino_train.json").write_text(json.dumps([good()]))
    words = ["convert", "flare-validate", "--input_dir", str(tmp_path), "--files"]
    assert command([*words, "retino_train.json"]) == 0
    assert command([*words, "CMMD_train.json"]) == 2


def test_the_default_folder_is_here_or_one_level_up(tmp_path, good, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert command(["convert", "flare-validate"]) == 2
    assert "there is no folder converted_data or ../converted_data" in capsys.readouterr().err
    (tmp_path / "converted_data").mkdir()
    assert command(["convert", "flare-validate"]) == 2
    assert "has no converted files. Run: qwenvl-ft convert flare" in capsys.readouterr().err
    (tmp_path / "converted_data/retino_train.json").write_text(json.dumps([good()]))
    script = ROOT / "examples/flare25/validate_conversion.py"
    for arguments in ([], ["--input_dir", "../converted_data"]):
        subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, cwd=work)
    assert (tmp_path / "converted_data/validation_report.json").is_file()
