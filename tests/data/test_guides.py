"""The examples in docs/dense.md and docs/augmentation.md give the output that is shown there."""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import picture

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.augment.operations import OPERATIONS
from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.dense.compose import dense_messages
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.dense.summary import build_summary
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DENSE, AUGMENTATION = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("dense", "augmentation"))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def records(text):
    """Parse consecutive JSON values."""
    decoder, place, values = json.JSONDecoder(), 0, []
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        value, place = decoder.raw_decode(text, place)
        values.append(value)
    return values


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for seed, name in enumerate(("a.png", "b.png")):
        picture(640, 480, seed).save(tmp_path / name)
    lines = [json.dumps(record, ensure_ascii=False) for record in records(blocks(DENSE, "jsonl")[0])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shown_records_give_the_shown_question_and_answers(folder):
    question, dense, summary = blocks(DENSE, "text")
    for ratio, expected in ((0, dense), (1, summary)):
        groups = DenseGroups(
            load_records("train.jsonl"), DenseOptions(scheme="B", summary_ratio=ratio, seed=1), training=False
        )
        assert len(groups) == 1
        user, answer = dense_messages(groups.conversation(0, 0))["messages"]
        assert answer["content"][0]["text"] == expected.strip()
        if not ratio:
            asked = "".join(part.get("text", "<image>") for part in user["content"])
            assert asked == question.strip()
    for record in records(blocks(DENSE, "jsonl")[0]):
        assert build_summary(record["objects"]) == record["summary"]


@pytest.mark.parametrize("text", [DENSE, AUGMENTATION], ids=["dense", "augmentation"])
def test_the_recipes_can_be_loaded(text, tmp_path):
    recipes = blocks(text, "yaml")
    assert recipes
    for block in recipes:
        path = tmp_path / "mine.yaml"
        path.write_text(block.replace("extends: ", f"extends: {ROOT}/recipes/"))
        recipe = load_recipe(path)
        for section, values in yaml.safe_load(block).items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert getattr(getattr(recipe, section), key) == value
        Augmenter.from_config(recipe.data.augmentation)
        DenseOptions.of(recipe, 1)


def test_every_operation_is_documented_with_its_parameters():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", AUGMENTATION, re.M))
    assert list(rows) == list(OPERATIONS)
    for name, parameters in rows.items():
        defaults = {}
        for f in fields(OPERATIONS[name]):
            assert f.default is not MISSING
            defaults[f.name] = list(f.default) if isinstance(f.default, tuple) else f.default
        assert yaml.safe_load(f"{{{parameters}}}") == defaults, name


def test_keys_that_are_named_exist():
    from qwenvl_ft.recipe.keys import own_types

    for section, key in re.findall(r"`(data|prompts|template)\.(\w+)`", DENSE + AUGMENTATION):
        assert key in own_types(section)


def test_the_code_runs_and_gives_what_it_says(folder):
    variables = {}
    for block in blocks(DENSE, "python") + blocks(AUGMENTATION, "python"):
        exec(block, variables)
    assert list(json.loads(variables["answer"])) == ["图片_1", "图片_2"]
    assert variables["changed"].size == (640, 480)
    assert not np.array_equal(np.asarray(variables["changed"]), np.asarray(variables["image"]))
    assert variables["objects"][0]["bbox_2d"] != [96, 120, 416, 360]
    assert variables["left"] == []
    assert variables["record"]["images"][0].size == (640, 480)
    assert variables["record"]["objects"][0]["bbox_2d"] != [96, 120, 416, 360]


def test_split_parts_a_file_by_its_objects(folder, capsys):
    assert main(["split", "train.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(\w+) +(\d+) records", printed) == [
        ("simple", "2"),
        ("medium", "0"),
        ("full", "2"),
        ("rest", "0"),
    ]
    assert main(["split", "train.jsonl", "--level", "two=2", "--level", "one=1", "--out", "parts"]) == 0
    assert len(load_records("parts/train.two.jsonl")) == len(load_records("parts/train.one.jsonl")) == 1
    record, _, root = load_records("parts/train.one.jsonl")[0]
    assert (Path(root) / record["images"][0]).is_file()
    assert main(["split", "train.jsonl", "--level", "two"]) == 2
    assert "NAME=RANGE" in capsys.readouterr().err
