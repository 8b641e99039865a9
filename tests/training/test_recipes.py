"""Every shipped recipe trains two steps exactly as shipped: only model, data, steps and folders differ.

Precision, attention, dataloader workers, packing, DeepSpeed, optimizer and trackers are those that a user gets. Recipes
with DeepSpeed run in a process of their own, because it leaves its state in the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import write_questions
from safetensors import safe_open

from qwenvl_ft import train
from qwenvl_ft.recipe.load import load_recipe

ELSEWHERE = {
    "stage_2_llm_aligner": "test_two_stages.py",
    "dense_4b": "test_dense_recipe.py",
    "curriculum": "test_curriculum.py",
}
"""Recipes that need more than records, and the files that test them."""
RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if path.stem not in ELSEWHERE]
SMALLER = {
    "aligner_adalora": ["tuner.adalora_tinit=0", "tuner.adalora_tfinal=0", "tuner.adalora_deltaT=1"],
    "galore": ["training.galore_rank=4"],
    "llamapro": ["tuner.llamapro_num_new_blocks=1"],
    "longlora": ["tuner.longlora_group_size=64"],
    "reft": ["tuner.reft_layers=[1,3]"],
}
"""Recipe -> overrides for a model of four layers and a run of two steps."""
WRITTEN = {
    "full": "model.visual.merger.norm.weight",
    "llamapro": "model.language_model.layers.4.mlp.up_proj.weight",
    "aligner_full": "base_model.model.model.visual.deepstack_merger_list.2.linear_fc1.weight",
    "aligner_adalora": "base_model.model.model.visual.merger.linear_fc1.lora_E",
    "aligner_adapter": "base_model.model.model.visual.merger.bottleneck_down.weight",
    "aligner_boft": "base_model.model.model.visual.merger.linear_fc1.boft_R",
    "aligner_dora": "base_model.model.model.visual.merger.linear_fc1.lora_magnitude_vector",
    "aligner_fourierft": "base_model.model.model.visual.merger.linear_fc1.fourierft_spectrum",
    "reft": "base_model.model.model.language_model.layers.3",
    "vera": "base_model.model.model.language_model.layers.0.mlp.up_proj.vera_lambda_b",
}
"""Recipe or train type -> beginning of a weight's name in the run's output."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return {"train": write_questions(folder, 16), "val": write_questions(folder, 3, "val", first=16)}


def names_in(folder):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


EXTRAS = {"galore": "galore_torch", "qlora_8b": "bitsandbytes"}
"""Recipe -> the optional package that it is for."""


def kind_of(model):
    """Return the tiny checkpoint that stands for a released model."""
    if "Qwen3.5" in model:
        return "qwen3_5_moe" if "-A" in model else "qwen3_5"
    return "moe" if "A3B" in model else "dense"


def as_shipped(path, checkpoints, data, folder):
    """Return the overrides without which a recipe cannot run here, and no others."""
    shipped = load_recipe(path)
    sizes = ["training.max_steps=2", *(SMALLER[path.stem] if path.stem in SMALLER else [])]
    val = [f"data.val={data['val']}"] if shipped.data.val else []
    model = checkpoints[kind_of(shipped.model.model)]
    return [f"model.model={model}", f"data.train={data['train']}", f"training.output_dir={folder}", *val, *sizes]


def cases():
    """Return the recipes; those with DeepSpeed take minutes, which other tests spend on DeepSpeed."""
    for path in RECIPES:
        is_long = load_recipe(path).deepspeed.enabled
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.soak] if is_long else [])


@pytest.mark.slow
@pytest.mark.parametrize("path", list(cases()))
def test_a_recipe_trains_as_it_is_shipped(path, data, checkpoints, tmp_path, monkeypatch):
    if path.stem in EXTRAS:
        pytest.importorskip(EXTRAS[path.stem])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, as_shipped(path, checkpoints, data, tmp_path / "run"))
    if recipe.deepspeed.enabled:
        words = [f"recipe={path}", *as_shipped(path, checkpoints, data, tmp_path / "run")]
        done = subprocess.run(
            [sys.executable, "-m", "qwenvl_ft.train", *words], capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    else:
        assert train(recipe).steps == 2
    assert "step 2/2" in (tmp_path / "run" / "training.log").read_text()
    written = names_in(tmp_path / "run")
    key = path.stem if path.stem in WRITTEN else recipe.tuner.train_type
    expected = WRITTEN.get(key, "base_model.model.model.")
    assert any(name.startswith(expected) for name in written), sorted(written)[:5]
    assert ("base_model" in next(iter(written))) == (recipe.tuner.train_type not in ("full", "llamapro"))


def test_only_model_data_steps_and_folders_of_a_recipe_are_changed(checkpoints, data, tmp_path):
    allowed = {"model.model", "data.train", "data.val", "training.output_dir", "training.max_steps"}
    for path in RECIPES:
        small = {override.partition("=")[0] for override in SMALLER.get(path.stem, [])}
        words = as_shipped(path, checkpoints, data, tmp_path)
        assert {word.partition("=")[0] for word in words} <= allowed | small, path.stem
        assert all(key.startswith(("tuner.", "training.galore_rank")) for key in small), path.stem
    assert load_recipe("base").model.torch_dtype == "bfloat16", "vacuous: the shipped precision is not a GPU's"


def test_recipes_that_need_more_are_tried_where_it_says():
    for name, file in ELSEWHERE.items():
        assert name in (Path(__file__).parent / file).read_text()
