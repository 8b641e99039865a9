"""Splitting by complexity: counts by hand, byte-identical lines, image paths that work from another folder."""

import json

import pytest

from qwenvl_ft.data.dense.complexity import split_by_complexity
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError, RecipeError


def record(number, count, *, kind="bbox_2d"):
    values = {"bbox_2d": [1, 1, 9, 9], "quad": [1, 1, 9, 1, 9, 9, 1, 9], "line": [1, 1, 9, 9, 1, 9]}[kind]
    objects = [{"desc": f"class{k % 2}/x", kind: values} for k in range(count)]
    return {"id": number, "images": [f"img/{number}.jpg"], "width": 10, "height": 10, "objects": objects}


COUNTS = [0, 1, 3, 4, 10, 11, 2]
RECORDS = [record(k, count) for k, count in enumerate(COUNTS)]


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_records_go_to_every_level_that_holds_their_number_of_objects(write_jsonl):
    path = write_jsonl(RECORDS, "train.jsonl")
    assert split_by_complexity(path) == {"simple": 3, "medium": 2, "full": 7, "rest": 0}
    assert ids(path.with_name("train.simple.jsonl")) == [1, 2, 6]
    assert ids(path.with_name("train.medium.jsonl")) == [3, 4]
    assert path.with_name("train.full.jsonl").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        ["train.jsonl", "train.simple.jsonl", "train.medium.jsonl", "train.full.jsonl"]
    )


def test_levels_and_the_measure_can_be_chosen_and_the_rest_is_counted(write_jsonl):
    path = write_jsonl([record(0, 1), record(1, 1, kind="line"), record(2, 2, kind="quad")], "t.jsonl")
    assert split_by_complexity(path, levels={"few": "2-3", "many": "5-"}, measure="points") == {
        "few": 2,
        "many": 1,
        "rest": 0,
    }
    assert split_by_complexity(path, levels={"one": "1"}, measure="classes") == {"one": 2, "rest": 1}


def test_images_are_found_from_another_folder(write_jsonl, tmp_path):
    path = write_jsonl([*RECORDS, {**record(7, 1), "images": ["/abs/a.jpg"]}], "train.jsonl")
    split_by_complexity(path, tmp_path / "curriculum" / "parts")
    target = tmp_path / "curriculum" / "parts" / "train.simple.jsonl"
    records = load_records([str(target)], cache_dir=tmp_path / "cache")
    assert [records[k][0]["images"] for k in range(4)] == [
        ["../../img/1.jpg"],
        ["../../img/2.jpg"],
        ["../../img/6.jpg"],
        ["/abs/a.jpg"],
    ]
    assert not path.with_name("train.simple.jsonl").exists()


def test_an_error_leaves_no_file_behind(write_jsonl, tmp_path):
    path = write_jsonl([*RECORDS, {"images": ["a"], "width": 1, "height": 1}], "bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl:8: no 'objects'"):
        split_by_complexity(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
    for levels in ({"a": "3-1"}, {"a": "few"}, {"a": "1 3"}, {"rest": "1-"}):
        with pytest.raises(DataError, match="level"):
            split_by_complexity(path, levels=levels)
    with pytest.raises(RecipeError, match=r"unknown measure 'object'\. Did you mean 'objects'"):
        split_by_complexity(path, measure="object")
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        split_by_complexity(tmp_path / "gone.jsonl")
