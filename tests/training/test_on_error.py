"""Unreadable records stop the run by name, or it keeps its plan and leaves out their labels."""

import json

import pytest
import torch
from dense_cases import dense_settings, write_dense
from run_cases import short_run, write_questions
from safetensors.torch import load_file

from qwenvl_ft import train as train_function
from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.load import load_recipe

SINGLE = ("data.images_per_user_turn=1", "training.num_train_epochs=2", "template.max_length=800")
SKIP = ("data.on_error=skip", "data.max_bad_fraction=0.2")


def run(tiny_dir, data, output, *more):
    return train_function(load_recipe(None, dense_settings(tiny_dir, data, output, *SINGLE, *more)))


def truncate(path):
    """A picture with a whole header and half of its pixels."""
    path.write_bytes(path.read_bytes()[:-200])


def logged(output, key):
    entries = map(json.loads, (output / "trainer_log.jsonl").read_text().splitlines())
    return [entry[key] for entry in entries if key in entry]


@pytest.fixture
def damaged(tmp_path):
    data = write_dense(tmp_path / "data", 12)
    truncate(tmp_path / "data" / "4.png")
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_the_run_stops_and_names_the_record(tiny_dir, damaged, tmp_path, workers):
    with pytest.raises(DataError, match=r"dense.jsonl:5: image .*4.png is damaged"):
        run(tiny_dir, damaged, tmp_path / "run", f"training.dataloader_num_workers={workers}")


def test_a_workers_error_is_the_same_line_as_without_workers(tiny_dir, damaged, tmp_path):
    """A DataLoader raises it again with the worker's traceback of twenty lines in the message."""
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            run(tiny_dir, damaged, tmp_path / f"run{workers}", f"training.dataloader_num_workers={workers}")
        messages.append(str(caught.value).replace(f"run{workers}", "run"))
        carried = "Traceback" in caught.value.__cause__.args[0]
        assert carried == bool(workers), "vacuous: the worker's error carries no traceback"
    assert messages[0] == messages[1]
    assert "Traceback" not in messages[1]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_skip_trains_by_the_same_plan_as_if_the_record_had_no_labels(
    tiny_dir, damaged, tmp_path, monkeypatch, caplog, workers
):
    more = (*SKIP, f"training.dataloader_num_workers={workers}", f"data.val={damaged}", "training.eval_strategy=epoch")
    result = run(tiny_dir, damaged, tmp_path / "skip", *more)
    warnings = [entry.message for entry in caplog.records if "left out" in entry.message]
    assert len(warnings) == 4, "once an epoch, in training and in evaluation"
    assert all("dense.jsonl:5: image " in line and "4.png is damaged" in line for line in warnings)
    assert logged(tmp_path / "skip", "bad_samples")[-1] == 1
    assert set(logged(tmp_path / "skip", "eval_bad_samples")) == {1}
    whole = write_dense(tmp_path / "whole", 12)
    plain = SampleDataset._sample

    def unlabelled(self, ticket):
        sample = plain(self, ticket)
        if sample["source"].record.endswith(":5"):
            sample["labels"] = torch.full_like(sample["labels"], IGNORE)
        return sample

    labelled = run(tiny_dir, whole, tmp_path / "labelled")
    monkeypatch.setattr(SampleDataset, "_sample", unlabelled)
    reference = run(tiny_dir, whole, tmp_path / "reference")
    assert result.steps == reference.steps == labelled.steps
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("skip", "reference", "labelled")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-5) for name in weights[0])
    assert not all(torch.allclose(weights[0][name], weights[2][name], atol=2e-5) for name in weights[0]), "vacuous"


def test_more_than_the_fraction_stops_the_run_after_all(tiny_dir, damaged, tmp_path):
    with pytest.raises(DataError, match=r"1 of the epoch's 12 samples could not be made.*max_bad_fraction=0.05"):
        run(tiny_dir, damaged, tmp_path / "run", "data.on_error=skip", "data.max_bad_fraction=0.05")


def test_records_that_cannot_be_measured_are_left_out_and_counted(tiny_dir, tmp_path):
    data = write_dense(tmp_path / "data", 12)
    (tmp_path / "data" / "7.png").unlink()
    data.write_text(data.read_text().replace('"width": 160', '"width": 161', 1))
    recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path / "run", *SINGLE, *SKIP))
    processor = build_processor(recipe)
    for _ in range(2):  # measured, then read from the cache
        dataset, _ = build_datasets(recipe, processor, 42)
        assert len(dataset) == 10
        assert dataset.at(0).measured.dropped() == {"that cannot be read": 2}
        assert "left out: 2 that cannot be read (the first: " in dataset.summary()
        assert "dense.jsonl:1: image " in dataset.summary()
    (tmp_path / "data" / "7.png").write_bytes((tmp_path / "data" / "6.png").read_bytes())
    assert len(build_datasets(recipe, processor, 42)[0]) == 11, "a file that is there now"
    recipe.data.max_bad_fraction = 0.05
    with pytest.raises(DataError, match=r"data.train: 1 of 12 samples cannot be read, more than data.max_bad_fraction"):
        build_datasets(recipe, processor, 42)
    recipe.data.on_error = "raise"
    with pytest.raises(
        DataError, match=r"dense.jsonl:1: image .* is 160 x 128 pixels, but its record states width=161"
    ):
        build_datasets(recipe, processor, 42)


def test_the_warning_strategy_trains_on_what_can_be_read_and_counts_the_rest(tiny_dir, tmp_path, capsys):
    """A quarter of the records is damaged: a line, a missing image, a record in no format. The rest is trained on."""
    data = write_questions(tmp_path, 12)
    lines = data.read_text().splitlines()
    sound = tmp_path / "sound.jsonl"
    sound.write_text("\n".join(lines[:3] + lines[4:7] + lines[9:]))
    lines[3], lines[8] = lines[3][:40], '{"a": 1}'
    data.write_text("\n".join(lines))
    (tmp_path / "7.png").unlink()

    def trained(source, *more):
        output = tmp_path / f"{source.stem}-{len(more)}"
        settings = short_run(tiny_dir, source, output, "template.max_length=160", "training.max_steps=3", *more)
        train_function(load_recipe(None, [*settings, "training.learning_rate=1e-2", "tuner.train_type=full"]))
        return load_file(output / "model.safetensors")

    with pytest.raises(DataError, match=r"train.jsonl:4: not valid JSON"):
        trained(data)
    found = trained(data, "data.check_dataset_strategy=warning")
    out = capsys.readouterr().out
    for reason in ("json", "structure", "missing"):
        assert f"error    {reason:<13}        1" in out
    assert f"left out: 3 that cannot be read (the first: {data}:4: not valid JSON" in out
    expected = trained(sound, "training.seed=42")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(DataError, match=r"3 of 12 samples cannot be read, more than data.max_bad_fraction=0.2"):
        trained(data, "data.check_dataset_strategy=warning", "data.max_bad_fraction=0.2")
