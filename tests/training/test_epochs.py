"""Epochs with different samples and numbers of rows: all counts are exact, and a resumed run ends the same."""

import json
import math

import pytest
import torch
from dense_cases import dense_settings, write_dense
from safetensors.torch import load_file

from qwenvl_ft import train as train_function
from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.plan import lengths as lengths_module
from qwenvl_ft.data.plan.packing import RunShape, pack_lengths
from qwenvl_ft.data.plan.sampler import EpochLoader, PlanSampler
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.trainer import QwenVLTrainer

LENGTH, ACCUMULATION = 1200, 2
AUGMENTATION = '{"ops": [{"rotate": {"max_deg": 20, "prob": 0.7}}, {"resize_by_scale": {"lo": 0.5, "hi": 1.6}}]}'
VARYING = (
    "data.summary_ratio=0.5",
    f"data.augmentation={AUGMENTATION}",
    f"template.max_length={LENGTH}",
    f"training.gradient_accumulation_steps={ACCUMULATION}",
    "training.lr_scheduler_type=linear",
    "training.warmup_steps=0",
    "training.num_train_epochs=5",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"), 14)


def settings(tiny_dir, data, output, *more):
    return dense_settings(tiny_dir, data, output, *VARYING, *more)


@pytest.fixture(scope="module")
def whole(tiny_dir, data, tmp_path_factory):
    """A run over five epochs that never stopped, with a checkpoint after every step."""
    output = tmp_path_factory.mktemp("whole")
    keep = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=99")
    return output, train_function(load_recipe(None, settings(tiny_dir, data, output, *keep)))


@pytest.fixture(scope="module")
def dataset(tiny_dir, data, tmp_path_factory):
    recipe = load_recipe(None, settings(tiny_dir, data, tmp_path_factory.mktemp("none")))
    return build_datasets(recipe, build_processor(recipe), 42)[0]


def steps_by_hand(dataset, epoch):
    rows = pack_lengths(dataset.at(epoch).tokens, max_length=LENGTH, seed=42, epoch=epoch)
    return math.ceil(len(rows) / ACCUMULATION)


def logged(output, key):
    entries = map(json.loads, (output / "trainer_log.jsonl").read_text().splitlines())
    return {entry["step"]: entry[key] for entry in entries if key in entry and "loss" in entry}


def test_steps_schedule_and_log_count_each_epochs_own_rows(whole, dataset):
    output, result = whole
    steps = [steps_by_hand(dataset, epoch) for epoch in range(5)]
    assert len(set(steps)) > 1, "vacuous: all epochs have the same steps"
    assert result.steps == sum(steps)
    assert set(logged(output, "total_steps").values()) == {sum(steps)}
    ends = [sum(steps[: k + 1]) for k in range(5)]
    epochs, samples = logged(output, "epoch"), logged(output, "samples_seen")
    assert [epochs[end] for end in ends] == [1, 2, 3, 4, 5]
    assert [samples[end] for end in ends] == [sum(len(dataset.at(e)) for e in range(k + 1)) for k in range(5)]
    rates = logged(output, "learning_rate")
    expected = [1e-3 * (1 - k / sum(steps)) for k in range(sum(steps))]
    assert [rates[k + 1] for k in range(sum(steps))] == pytest.approx(expected), "the schedule ends with the run"


def test_a_run_goes_on_in_the_middle_of_any_epoch_to_the_same_bits(whole, dataset, tiny_dir, data, tmp_path):
    """Stopped in an epoch that transformers would compute wrongly by division, and at the end of an epoch."""
    output, result = whole
    steps = [steps_by_hand(dataset, epoch) for epoch in range(5)]
    within = next(k for k in range(1, sum(steps)) if k // steps[0] != locate(steps, k)[0] and locate(steps, k)[1])
    expected = load_file(output / "model.safetensors")
    for stop in (within, sum(steps[:3])):
        assert not same(load_file(output / f"checkpoint-{stop}" / "model.safetensors"), expected), "vacuous"
        again = tmp_path / f"from-{stop}"
        more = ("training.dataloader_num_workers=1", f"training.resume_from_checkpoint={output}/checkpoint-{stop}")
        assert train_function(load_recipe(None, settings(tiny_dir, data, again, *more))).steps == result.steps
        assert same(load_file(again / "model.safetensors"), expected), f"from step {stop}"
        losses = logged(output, "loss")
        assert logged(again, "loss") == {step: losses[step] for step in losses if step > stop}


def test_by_the_counts_of_the_first_epoch_it_would_not(whole, dataset, tiny_dir, data, tmp_path, monkeypatch):
    """Guard of the test above: division, as transformers does it, gives another epoch."""
    output, _ = whole
    steps = [steps_by_hand(dataset, epoch) for epoch in range(5)]
    stop = next(k for k in range(1, sum(steps)) if k // steps[0] != locate(steps, k)[0] and locate(steps, k)[1])
    monkeypatch.setattr(QwenVLTrainer, "resume_at", lambda _, step: divmod(step, steps[0]))
    more = (f"training.resume_from_checkpoint={output}/checkpoint-{stop}",)
    train_function(load_recipe(None, settings(tiny_dir, data, tmp_path, *more)))
    assert not same(load_file(tmp_path / "model.safetensors"), load_file(output / "model.safetensors"))


def locate(steps, done):
    """Return (epoch, steps into it), counted by hand."""
    epoch = 0
    while done >= steps[epoch]:
        done, epoch = done - steps[epoch], epoch + 1
    return epoch, done


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_max_steps_and_parts_of_an_epoch_are_counted_by_epoch(dataset, tiny_dir, data, tmp_path):
    steps = [steps_by_hand(dataset, epoch) for epoch in range(5)]
    part = train_function(
        load_recipe(None, settings(tiny_dir, data, tmp_path / "part", "training.num_train_epochs=1.5"))
    )
    assert part.steps == steps[0] + math.ceil(0.5 * steps[1])
    wanted = sum(steps) - 1
    overrides = settings(tiny_dir, data, tmp_path / "max", f"training.max_steps={wanted}")
    result = train_function(load_recipe(None, overrides))
    assert result.steps == wanted
    assert set(logged(tmp_path / "max", "total_steps").values()) == {wanted}
    assert 4 < max(logged(tmp_path / "max", "epoch").values()) <= 5


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("persistent", [True, False])
def test_workers_make_each_epochs_own_samples(dataset, workers, persistent):
    """Persistent workers, which were started in an earlier epoch, too."""

    def epochs(**options):
        sampler = PlanSampler(dataset, RunShape(1, 1, 2), max_length=LENGTH, seed=42)
        loader = EpochLoader(dataset, sampler, QwenVLCollator(), **options)
        for epoch in (0, 1, 2):
            loader.set_epoch(epoch)
            yield list(loader)

    alone = list(epochs())
    assert not torch.equal(alone[0][0]["input_ids"], alone[1][0]["input_ids"]), "vacuous: epochs are alike"
    for expected, loaded in zip(alone, epochs(num_workers=workers, persistent_workers=persistent), strict=True):
        assert len(expected) == len(loaded)
        for one, other in zip(expected, loaded, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert one["sources"] == other["sources"]


def test_every_record_is_seen_once_in_every_epoch(dataset):
    sampler = PlanSampler(dataset, RunShape(2, 1, 2), max_length=LENGTH, seed=42)
    for epoch in (0, 3):
        planned = [i for passes in sampler.plan(epoch) for batch in passes for i in batch if i >= 0]
        sources = [dataset.conversation(dataset.ticket(epoch, i)).source.record for i in planned]
        lines = sorted(int(place.rpartition(":")[2]) for source in sources for place in source.split(" + "))
        assert lines == list(range(1, 15))


def test_what_does_not_differ_is_measured_once(tiny_dir, data, tmp_path, monkeypatch):
    """Augmented colours of single records: pictures differ between epochs, lengths do not."""
    measured = []
    real = lengths_module._measure
    monkeypatch.setattr(lengths_module, "_measure", lambda *a: measured.append(1) or real(*a))
    more = ("data.images_per_user_turn=1", 'data.augmentation={"ops": ["hsv"]}')
    recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path, *more))
    dataset, _ = build_datasets(recipe, build_processor(recipe), 42)
    sampler = PlanSampler(dataset, RunShape(), max_length=1600)
    assert len({sampler.steps(epoch) for epoch in range(4)}) == 1
    assert len(measured) == 1
    first, second = (dataset[dataset.ticket(epoch, 0)] for epoch in (0, 1))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
