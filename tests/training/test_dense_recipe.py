"""The shipped recipe for dense captions trains, as it is, on a small model."""

import json

import torch
from dense_cases import write_dense
from safetensors.torch import load_file

from qwenvl_ft import train as train_function
from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.augment.colour import COLOUR
from qwenvl_ft.recipe.load import load_recipe

SMALL = ("training.max_steps=2", "training.logging_steps=1")


def test_the_dense_recipe_trains_adapters_and_the_whole_aligner(tiny_dir, tmp_path):
    data = write_dense(tmp_path / "data", 12)
    output = tmp_path / "run"
    overrides = [f"model.model={tiny_dir}", f"data.train={data}", f"training.output_dir={output}", *SMALL]
    recipe = load_recipe("dense_4b", overrides)
    result = train_function(recipe)
    assert result.steps == 2
    losses = [json.loads(line)["loss"] for line in (output / "trainer_log.jsonl").read_text().splitlines()[:2]]
    assert all(0 < loss < 20 for loss in losses)
    saved = load_file(output / "adapter_model.safetensors")
    mergers = {name for name in saved if "merger" in name}
    assert {name.split("deepstack_merger_list.")[1][0] for name in mergers if "deepstack" in name} == {"0", "1", "2"}
    assert any("visual.merger" in name for name in mergers)
    assert not any("lora" in name for name in mergers)
    assert any("language_model" in name and "lora_A" in name for name in saved)
    assert not any("visual.blocks" in name for name in saved)


def test_its_augmentation_reaches_the_samples(tiny_dir, tmp_path):
    data = write_dense(tmp_path / "data", 12)
    overrides = [f"model.model={tiny_dir}", f"data.train={data}", *SMALL]
    samples = {}
    for name, more in (("plain", ["data.augmentation=null"]), ("augmented", [])):
        recipe = load_recipe("dense_4b", [*overrides, *more])
        dataset = build_datasets(recipe, build_processor(recipe), 42)[0]
        samples[name] = [dataset[dataset.ticket(epoch, 0)] for epoch in (0, 1)]
    ops = {name for entry in load_recipe("dense_4b", overrides).data.augmentation["ops"] for name in entry}
    assert len(ops & set(COLOUR)) == 7
    for plain, changed in zip(samples["plain"], samples["augmented"], strict=True):
        assert plain["source"].record == changed["source"].record
        assert not torch.equal(plain["input_ids"], changed["input_ids"])
