"""Mixtures: seeded, disjoint where they must be, and the same in every process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwenvl_ft.data.readers import READERS
from qwenvl_ft.data.sources.mixture import joined, load_mixture
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS
from qwenvl_ft.data.sources.sampling import draw_rows, rates_of_weights, validation_mask
from qwenvl_ft.errors import DataError, QwenVLError, RecipeError
from qwenvl_ft.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def clean_registry():
    before = dict(DATASETS), dict(READERS)
    yield
    for table, kept in zip((DATASETS, READERS), before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def files(write_jsonl):
    """Three files of 100, 40 and 10 records."""
    sizes = {"a": 100, "b": 40, "c": 10}
    return {
        name: str(write_jsonl([{"id": f"{name}{i}"} for i in range(size)], f"{name}.jsonl"))
        for name, size in sizes.items()
    }


def ids(records):
    return [records[i][0]["id"] for i in range(len(records))]


def mixture(*overrides, seed=0):
    return load_mixture(load_recipe(None, list(overrides)).data, seed)


def counts(records):
    names = [name[0] for name in ids(records)]
    return {name: names.count(name) for name in sorted(set(names))}


# -- numbers -------------------------------------------------------------------------------------------------------


def test_rates_above_and_below_one():
    assert draw_rows(range(4), 1.0, "k") == range(4)
    half = draw_rows(range(1000), 0.5, "k")
    assert len(set(half.tolist())) == 500
    assert (np.diff(half) > 0).all()
    more = draw_rows(range(4), 2.5, "k").tolist()
    assert more[:8] == [0, 1, 2, 3] * 2
    assert len(set(more[8:])) == 2
    assert draw_rows(np.array([7, 9], dtype=np.int32), 2.0, "k").tolist() == [7, 9, 7, 9]


def test_weights_become_rates_of_which_the_largest_is_one():
    assert rates_of_weights([100, 1000], [1, 3]) == pytest.approx([1.0, 0.3])
    assert rates_of_weights([100, 1000], [0.01, 0.99]) == pytest.approx([1000 / 99 / 100, 1.0])


def test_a_share_is_held_out_but_never_all_or_none():
    assert validation_mask(1000, 0.01, 0).sum() == 10
    assert validation_mask(3, 0.01, 0).sum() == 1
    assert validation_mask(2, 0.99, 0).sum() == 1
    assert validation_mask(1, 0.5, 0).sum() == 0
    assert (validation_mask(1000, 0.1, 0) != validation_mask(1000, 0.1, 1)).any()


# -- samples and splits --------------------------------------------------------------------------------------------


def test_a_sample_is_drawn_from_all_records_and_not_from_the_first(files):
    """Older versions of ms-swift took the first val_dataset_sample records."""
    val = mixture(f"data.train={files['a']}", f"data.val={files['b']},{files['a']}", "data.val_dataset_sample=30")[1][
        ""
    ]
    drawn = ids(val)
    assert len(set(drawn)) == 30
    assert drawn == sorted(drawn, key=(ids(load_records([files["b"], files["a"]]))).index), "not in the files' order"
    assert {name[0] for name in drawn} == {"a", "b"}
    assert max(int(name[1:]) for name in drawn if name[0] == "a") > 50
    train = mixture(f"data.train={files['b']}", "data.train_dataset_sample=25")[0]
    assert len(set(ids(train))) == 25
    assert ids(mixture(f"data.train={files['b']}", "data.train_dataset_sample=999")[0]) == ids(load_records(files["b"]))


@pytest.mark.parametrize("selection", ["{a},{b}", "{a}%200,{b}%50", "{a}%50,{a}%150", "{a},again,{b}"])
def test_a_split_shares_no_record_however_they_are_taken(files, selection):
    DATASETS["again"] = {"annotation_path": files["a"]}
    chosen = selection.format(**files)
    train, val = mixture(f"data.train={chosen}", "data.split_dataset_ratio=0.1")
    held = ids(val[""])
    assert set(held).isdisjoint(ids(train))
    assert set(ids(train)) | set(held) == set(ids(load_records(chosen)))
    assert 0.05 < len(set(held)) / len(set(ids(load_records(chosen)))) < 0.15
    for part in val[""].parts:
        assert len(part.rows) == len(set(part.rows.tolist())), "a held out record is repeated"


def test_a_split_depends_on_the_seed_alone(files, tmp_path):
    overrides = [f"data.train={files['a']}", "data.split_dataset_ratio=0.1"]
    held = ids(mixture(*overrides)[1][""])
    assert held == ids(mixture(*overrides)[1][""])
    assert held != ids(mixture(*overrides, seed=1)[1][""])
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(Path(files["a"]).read_text())
    assert held == ids(mixture(f"data.train={moved}", "data.split_dataset_ratio=0.1")[1][""])


def test_a_split_is_only_for_runs_without_a_validation_set(files):
    overrides = [f"data.train={files['a']}", f"data.val={files['c']}", "data.split_dataset_ratio=0.1"]
    train, val = mixture(*overrides)
    assert (len(train), counts(val[""])) == (100, {"c": 10})


RANK = """
import json, sys
from qwenvl_ft.data.sources.mixture import load_mixture
from qwenvl_ft.recipe.load import load_recipe
train, val = load_mixture(load_recipe(None, sys.argv[1:]).data, 3)
ids = lambda records: [records[i][0]["id"] for i in range(len(records))]
print(json.dumps([ids(train), ids(val[""]), train.fingerprint]))
"""


def test_another_process_draws_the_same(files):
    overrides = [
        f"data.train={files['a']}%50,{files['b']}",
        "data.split_dataset_ratio=0.1",
        "data.train_dataset_sample=60",
        f"data.train_dataset_mix_ds={files['c']}",
        "data.train_dataset_mix_ratio=0.5",
    ]
    train, val = mixture(*overrides, seed=3)
    other = subprocess.run([sys.executable, "-c", RANK, *overrides], check=True, capture_output=True, text=True)
    assert json.loads(other.stdout) == [ids(train), ids(val[""]), train.fingerprint]
    assert counts(train)["c"] == 30


# -- mixing --------------------------------------------------------------------------------------------------------


def test_weights_mix_in_their_proportion_without_repeats(files):
    train = mixture(f'data.train={{"{files["a"]}": 1, "{files["b"]}": 1}}')[0]
    assert counts(train) == {"a": 40, "b": 40}
    assert len(set(ids(train))) == 80
    train = mixture(f'data.train={{"{files["a"]}": 3, "{files["b"]}": 1, "{files["c"]}": 0.5}}')[0]
    assert counts(train) == {"a": 60, "b": 20, "c": 10}
    sample = mixture(f'data.train={{"{files["a"]}": 3, "{files["b"]}": 1}}', "data.train_dataset_sample=10")[0]
    assert len(sample) == 10


def test_other_data_are_mixed_in_by_a_ratio(files):
    mix = f"data.train_dataset_mix_ds={files['b']}"
    assert counts(mixture(f"data.train={files['a']}", mix, "data.train_dataset_mix_ratio=0.2")[0]) == {
        "a": 100,
        "b": 20,
    }
    repeated = mixture(f"data.train={files['a']}", mix, "data.train_dataset_mix_ratio=1.5")[0]
    assert counts(repeated) == {"a": 100, "b": 150}
    names = ids(repeated)
    assert {names.count(f"b{i}") for i in range(40)} == {3, 4}
    first = mixture(f"data.train={files['a']},{files['b']},{files['c']}", "data.train_dataset_mix_ratio=0.1")[0]
    assert sum(counts(first).values()) == 110
    assert counts(first)["a"] == 100


def test_an_impossible_mixture_is_one_clear_line(files):
    a, c = files["a"], files["c"]
    one = Path(a).with_name("one.jsonl")
    one.write_text('{"id": 1}\n')
    no_other, empty = r"Name the others in data\.train_dataset_mix_ds", "leaves 1 for training and 0 for validation"
    cases = [
        ([], RecipeError, r"data\.train is not set"),
        ([f"data.train={a}", "data.train_dataset_mix_ratio=1"], DataError, no_other),
        ([f"data.train={one}", "data.split_dataset_ratio=0.5"], DataError, empty),
        ([f"data.train={a}", "data.split_dataset_ratio=1"], RecipeError, "must be at least 0 and below 1"),
        ([f"data.train={a}", "data.val_dataset_sample=0"], RecipeError, "must be above 0, or -1 for all"),
        ([f'data.train={{"{a}": 0}}'], RecipeError, "must be above 0"),
        ([f"data.train={a}", f'data.val={{"two words": "{c}"}}'], RecipeError, "data.val has a set named 'two words'"),
        ([f"data.train={a}", 'data.readers={"r": "nowhere:f"}'], DataError, "reader 'nowhere:f' cannot be imported"),
    ]  # fmt: skip
    for overrides, kind, message in cases:
        with pytest.raises(QwenVLError, match=message) as caught:
            mixture(*overrides)
        assert isinstance(caught.value, kind)
        assert "\n" not in str(caught.value)


# -- several validation sets, custom readers in a recipe ----------------------------------------------------------


def test_validation_sets_by_name(files):
    overrides = [
        f"data.train={files['a']}",
        f'data.val={{"small": "{files["c"]}", "both": ["{files["b"]}%50", "{files["c"]}"]}}',
    ]
    val = mixture(*overrides, "data.val_dataset_sample=25")[1]
    assert {name: len(records) for name, records in val.items()} == {"small": 10, "both": 25}
    assert len(joined(val)) == 35
    recipe = load_recipe(None, overrides)
    assert recipe.data.evaluates
    assert recipe.training.arguments["eval_strategy"] == "steps"
    assert (
        load_recipe(None, [overrides[0], "data.split_dataset_ratio=0.1"]).training.arguments["eval_strategy"] == "steps"
    )
    assert not load_recipe(None, overrides[:1]).data.evaluates


def test_a_recipe_brings_its_own_readers(files, tmp_path, monkeypatch):
    (tmp_path / "recipe_formats.py").write_text(
        "def read(record, source, root):\n    return {'query': record['id'], 'response': 'r'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mixture(f"data.train={files['c']}", 'data.readers={"first": "recipe_formats:read", "next": "recipe_formats:read"}')
    assert list(READERS)[:2] == ["first", "next"], "they are not tried in the order given"
