"""``qwenvl-ft convert``: what it prints, its exit codes, and errors on one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flare_cases import CASES, read, run

from qwenvl_ft.cli.main import main as command

ROOT = Path(__file__).resolve().parents[2]


def test_packed_images_are_named(tree, capsys):
    tree.fill([CASES[1]])
    folder = tree.folder("retino")
    shutil.rmtree(folder / "imagesTr")
    (folder / "imagesTr.zip").write_bytes(b"PK")
    assert run(tree, "--datasets", "retino", "--splits", "train") == 1
    missing = read(tree, "conversion_report.json")["not_found"]
    assert f"unzip {folder}/imagesTr.zip -d {folder}" in missing[0]["why"]
    assert not (tree.base.parent / "converted_data" / "retino_train.json").exists()
    assert "nothing was converted of retino" in capsys.readouterr().err


def test_missing_data_is_reported(tree, capsys):
    tree.fill([CASES[1]])
    assert run(tree, "--datasets", "retino", "CMMD") == 1
    streams = capsys.readouterr()
    assert "nothing for: retino val, CMMD train, CMMD val" in streams.out
    assert streams.err == "error: nothing was converted of CMMD\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasets", "path", "polyp", "isic2019"], "unknown FLARE data set 'path'"),
        (["--splits", "trian"], "unknown split 'trian'. Did you mean 'train'? Known: test, train, val."),
        (["--coordinates", "norm100"], "--coordinates norm100: unknown. Did you mean 'norm1000'?"),
        (["--check_images", "all"], "--check_images all: unknown."),
        (["--num_workers", "0"], "--num_workers 0: give 1 or more"),
        (["--input_dir", "/nowhere"], "there is no folder /nowhere. Give the FLARE data with --input_dir."),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(tree, capsys, arguments, message):
    tree.base.mkdir()
    assert command(["convert", "flare", "--input_dir", str(tree.base), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("{}", "questions are a JSON list"), ("[" * 9999, "not valid JSON")],
)
def test_a_malformed_file_of_questions_is_an_error(tree, capsys, content, message):
    tree.write("retino", [])
    tree.file("retino").write_text(content)
    assert run(tree, "--datasets", "retino") == 1
    assert message in capsys.readouterr().err


def test_the_list_names_every_data_set(capsys):
    assert command(["convert", "flare", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 19 + 1
    assert lines[1].split()[:3] == ["neojaundice", "*", "flare_neojaundice"]


def test_help_works_and_unknown_conversions_are_errors(capsys):
    assert command(["convert"]) == 0
    assert "flare-validate" in capsys.readouterr().out
    assert command(["convert", "flare", "--help"]) == 0
    assert "usage: qwenvl-ft convert flare" in capsys.readouterr().out
    assert command(["convert", "flair"]) == 2
    assert "unknown conversion 'flair'. Did you mean 'flare'?" in capsys.readouterr().err


def test_the_guides_script_takes_the_guides_flags(full_tree):
    script = ROOT / "examples/flare25/convert_flare_to_qwen3vl.py"
    words = [
        "--datasets",
        "neojaundice",
        "retino",
        "--splits",
        "train",
        "val",
        "--base_dir",
        full_tree.base,
        "--verbose",
    ]
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True, cwd=full_tree.base)
    assert len(read(full_tree, "conversion_report.json")["conversion_results"]) == 4
