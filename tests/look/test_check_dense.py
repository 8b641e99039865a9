"""The check measures dense captions in the groups of training, and reports their faults record by record."""

import json
import re

import pytest
from dense_cases import dense_settings, write_dense
from look_cases import asked, checked

from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.recipe.load import load_recipe


def dense_lengths(recipe, epoch=0):
    """Return each sample's tokens, the steps of an epoch, and the data set, from what training itself builds."""
    arguments = recipe.training.arguments
    dataset, _ = build_datasets(recipe, build_processor(recipe), arguments["seed"])
    shape = RunShape(1, arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"])
    sampler = PlanSampler(dataset, shape, max_length=recipe.template.max_length, seed=arguments["seed"])
    return sorted(dataset.at(epoch).tokens.tolist()), sampler.steps(epoch), dataset


GROUPS = [
    "data.images_per_user_turn=3",
    "data.summary_ratio=0.5",
    "prompts.scheme=B",
    "training.gradient_accumulation_steps=2",
    'data.augmentation={"ops": [{"random_crop": {"lo": 0.4, "prob": 1}}, "pad_to_multiple"]}',
]


def test_dense_captions_are_checked_in_the_groups_that_training_draws(tiny_dir, tmp_path):
    recipe = load_recipe(None, dense_settings(tiny_dir, write_dense(tmp_path / "data", 20), tmp_path / "run", *GROUPS))
    report = check_recipe(recipe, quiet=True)
    split = report.splits["train"]
    lengths, steps, dataset = dense_lengths(recipe)
    assert (report.faults, split.records, split.groups, split.encoded) == ([], 20, 7, 5)
    assert sorted(split.lengths) == lengths
    assert split.forecast.steps_per_epoch == steps
    supervised = sum(int((dataset[k]["labels"] >= 0).sum()) for k in range(len(dataset)))
    assert split.forecast.supervised_share == pytest.approx(supervised / sum(lengths))
    recipe.data.augmentation = recipe.data.summary_ratio = None
    assert dense_lengths(recipe)[0] != lengths, "vacuous: neither augmentation nor modes change a length"
    assert sorted(check_recipe(recipe, quiet=True).splits["train"].lengths) == dense_lengths(recipe)[0]


def test_a_group_that_is_too_long_is_reported_at_its_first_record(tiny_dir, tmp_path, capsys):
    data = write_dense(tmp_path / "data", 12)
    alone = dense_settings(tiny_dir, data, tmp_path / "run", "data.images_per_user_turn=1")
    limit = max(check_recipe(load_recipe(None, alone), quiet=True).splits["train"].lengths)
    words = dense_settings(tiny_dir, data, tmp_path / "run")
    long = sum(length > limit for length in dense_lengths(load_recipe(None, words))[0])
    assert long > 3, "vacuous: groups are no longer than records"
    report = check_recipe(load_recipe(None, [*words, f"template.max_length={limit}"]), quiet=True)
    assert [fault.reason for fault in report.faults] == ["too_long"] * long
    assert all(re.fullmatch(rf"{data}:\d+", fault.where) for fault in report.faults)
    assert re.search(rf"template.max_length is {limit} \(grouped with {data}:\d+\)", report.faults[0].message)
    main(["check", str(data), f"--model={tiny_dir}", f"--max_length={limit}"])
    assert "6 groups of dense captions, as the first epoch draws them" in capsys.readouterr().out


def test_a_bad_record_of_a_group_is_reported_once_and_hides_no_other_group(tiny_dir, tmp_path):
    data = write_dense(tmp_path / "data", 200)
    (tmp_path / "data" / "7.png").unlink()
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:20], lines[20].replace('"width": 160', '"width": 161'), *lines[21:]]))
    recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path / "run", "data.images_per_user_turn=2"))
    report = check_recipe(recipe, quiet=True, num_proc=2)
    assert [(fault.reason, fault.where) for fault in report.faults] == [
        ("missing", f"{data}:8"),
        ("size", f"{data}:21"),
    ]
    split = report.splits["train"]
    assert split.groups == 100
    assert len(split.lengths) in (98, 99), "two bad records may stand in one group"


def test_dense_captions_that_training_refuses_are_reported_record_by_record(tiny_dir, tmp_path, data):
    path = write_dense(tmp_path / "dense", 6)
    lines = path.read_text().splitlines()
    wrong = [json.loads(lines[4]) | {"summary": "[1, 2, 3, 4]"}, json.loads(lines[5]) | {"summary": None}]
    path.write_text("\n".join([*lines[:4], *map(json.dumps, wrong)]))
    recipe = load_recipe(None, dense_settings(tiny_dir, path, tmp_path / "run", "data.summary_ratio=0.5"))
    with pytest.raises(DataError, match="2 of 6 records have no valid 'summary'"):
        dense_lengths(recipe)
    faults = check_recipe(recipe, quiet=True).faults
    assert [(fault.reason, fault.where) for fault in faults] == [("structure", f"{path}:5"), ("structure", f"{path}:6")]
    assert [fault.message.partition(",")[0] for fault in faults] == [
        "summary: it holds coordinates",
        "summary: there is none",
    ]
    moved = 'data.augmentation={"ops": ["gamma", "hflip"]}'
    report = checked(data([asked("a.png")]), moved)
    assert [fault.message.partition(",")[0] for fault in report.faults] == ["data.augmentation has hflip"]
    assert report.splits["train"].records == 1, "the records are checked all the same"
