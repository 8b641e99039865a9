"""The two recipes of the guides in turn: one adapter, which resumes, merges and generates like any other."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from run_cases import short_run, write_questions
from safetensors.torch import load_file

from qwenvl_ft.cli.main import main as command
from qwenvl_ft.model.load import load_model
from qwenvl_ft.train import main

MERGERS = ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{index}" for index in range(3))]
WEIGHTS = "adapter_model.safetensors"
LAST = ("training.save_strategy=steps", "training.load_best_model_at_end=false")
"""Settings of a run that ends with the last step's weights, not the best ones."""


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    """Train a recipe at toy size: ``run(name, folder, *overrides)``."""
    data = write_questions(tmp_path_factory.mktemp("staged"), 8, longest=1)

    def train(name, folder, *more):
        overrides = short_run(
            tiny_dir,
            data,
            folder,
            "data.split_dataset_ratio=0.25",
            "template.max_length=128",
            "template.max_pixels=16384",
            "tuner.lora_rank=4",
            "training.gradient_accumulation_steps=1",
            "training.learning_rate=1e-2",
            "training.max_steps=4",
            "training.eval_steps=2",
            "training.save_steps=2",
            "training.logging_steps=1",
            *more,
        )
        return main([f"recipe={name}", *overrides])

    return train


@pytest.fixture(scope="module")
def stages(run, tmp_path_factory):
    """Return the folders of both stages; the first one trained the smallest merger in full."""
    root = tmp_path_factory.mktemp("stages")
    full = f"tuner.modules_to_save=[{MERGERS[1]}]"
    assert run("stage_1_aligner", root / "one", full) == 0
    first = f"tuner.resume_from_checkpoint={root / 'one'}"
    assert run("stage_2_llm_aligner", root / "two", first, *LAST) == 0
    return root / "one", root / "two"


def answers(model):
    ids = torch.arange(40)[None] % 300
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_first_stage_leaves_its_adapter_and_its_full_merger_alone(stages):
    kept = load_file(stages[0] / WEIGHTS)
    assert kept
    assert all(".visual." in key and ("merger" in key) for key in kept)
    assert any(key.startswith(f"base_model.model.{MERGERS[1]}.linear_fc1.weight") for key in kept)
    written = json.loads((stages[0] / "adapter_config.json").read_text())
    assert written["modules_to_save"] == MERGERS[1:2]


def test_the_second_stage_leaves_one_adapter_of_both(stages, tiny_dir):
    one, two = (load_file(folder / WEIGHTS) for folder in stages)
    assert one.keys() < two.keys()
    assert all(not torch.equal(one[key], two[key]) for key in one), "the aligner goes on training"
    assert not any(".blocks." in key for key in two)
    assert json.loads((stages[1] / "adapter_config.json").read_text())["modules_to_save"] == MERGERS[1:2]
    state = json.loads((stages[1] / "trainer_state.json").read_text())
    assert state["global_step"] == 4, "its own steps, from the first one on"
    base = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa")
    plain = answers(base)
    assert not torch.allclose(answers(PeftModel.from_pretrained(base, stages[1])), plain, atol=1e-3)
    size = sum(path.stat().st_size for path in stages[1].glob("*.safetensors"))
    assert size < (tiny_dir / "model.safetensors").stat().st_size / 2, "no full model in an adapter's folder"


def test_both_recipes_train_as_they_are_shipped(tiny_dir, tmp_path):
    """Only model, data, steps and folders differ: bfloat16, dataloader workers and sizes are those of the recipes."""
    data = write_questions(tmp_path, 60, longest=1)  # the second recipe holds out a fiftieth
    words = [f"model.model={tiny_dir}", f"data.train={data}", "training.max_steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["recipe=stage_1_aligner", *words, f"training.output_dir={one}"]) == 0
    first = f"tuner.resume_from_checkpoint={one}"
    assert main(["recipe=stage_2_llm_aligner", *words, first, f"training.output_dir={two}"]) == 0
    assert load_file(one / WEIGHTS).keys() < load_file(two / WEIGHTS).keys()


def test_a_second_stage_that_was_stopped_ends_at_the_same_bits(run, stages, tmp_path):
    first = f"tuner.resume_from_checkpoint={stages[0]}"
    again = f"training.resume_from_checkpoint={stages[1] / 'checkpoint-2'}"
    assert run("stage_2_llm_aligner", tmp_path / "again", first, again, *LAST) == 0
    whole, resumed = load_file(stages[1] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    middle = load_file(stages[1] / "checkpoint-2" / WEIGHTS)
    assert any(not torch.equal(whole[key], middle[key]) for key in whole), "vacuous: nothing was left to train"


def test_the_best_adapter_is_what_the_shipped_recipe_ends_with(run, stages, tmp_path):
    first = f"tuner.resume_from_checkpoint={stages[0]}"
    assert run("stage_2_llm_aligner", tmp_path / "best", first, "training.learning_rate=0.3") == 0
    state = json.loads((tmp_path / "best" / "trainer_state.json").read_text())
    best = tmp_path / "best" / f"checkpoint-{state['best_global_step']}"
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert losses[state["best_global_step"]] == min(losses.values()) == state["best_metric"]
    kept, ended = load_file(best / WEIGHTS), load_file(tmp_path / "best" / WEIGHTS)
    assert all(torch.equal(kept[key], ended[key]) for key in kept)


def test_the_adapter_is_merged_like_any_other(stages, tiny_dir, tmp_path):
    two = tmp_path / "two"
    shutil.copytree(stages[1], two)
    assert command(["merge", str(two), str(tmp_path / "merged")]) == 0
    adapted = PeftModel.from_pretrained(load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa"), two)
    merged = load_model(tmp_path / "merged", torch_dtype="float32", attn_impl="sdpa")
    torch.testing.assert_close(answers(merged), answers(adapted), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_an_adapter_is_refused_before_anything_is_loaded(run, stages, tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr("qwenvl_ft.model.load._from_pretrained", never)
    assert run("stage_2_llm_aligner", tmp_path / "new", f"model.model={stages[0]}") == 2
    error = capsys.readouterr().err
    assert f"model.model={stages[0]} is an adapter." in error
    assert f"tuner.resume_from_checkpoint={stages[0]}" in error
    assert run("stage_2_llm_aligner", tmp_path / "new", "tuner.resume_from_checkpoint=nowhere") == 2
    assert "tuner.resume_from_checkpoint=nowhere does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
