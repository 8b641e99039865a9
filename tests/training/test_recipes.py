"""Every shipped recipe trains two steps on the tiny model of its kind, without its settings for GPUs."""

from pathlib import Path

import pytest
from run_cases import short_run, write_questions
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
    return write_questions(tmp_path_factory.mktemp("recipes"), 6)


def names_in(folder):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


EXTRAS = {"galore": "galore_torch", "qlora_8b": "bitsandbytes"}
"""Recipe -> the optional package that it is for."""


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path, data, checkpoints, tmp_path):
    if path.stem in EXTRAS:
        pytest.importorskip(EXTRAS[path.stem])
    shipped = load_recipe(path)
    kind = "moe" if "A3B" in shipped.model.model else "dense"
    overrides = short_run(
        checkpoints[kind],
        data,
        tmp_path / "run",
        "data.val=",
        "template.max_length=256",
        "template.max_pixels=65536",
        "training.max_steps=2",
        "training.gradient_accumulation_steps=1",
        "training.per_device_train_batch_size=1",
        "training.save_strategy=no",
        "training.eval_strategy=no",
        "deepspeed.enabled=false",
        "evaluation.run_after_training=false",
        *SMALLER.get(path.stem, []),
    )
    recipe = load_recipe(path, overrides)
    assert (recipe.tuner.train_type, recipe.tuner.freeze_aligner) == (
        shipped.tuner.train_type,
        shipped.tuner.freeze_aligner,
    )
    result = train(recipe)
    assert result.steps == 2
    written = names_in(tmp_path / "run")
    key = path.stem if path.stem in WRITTEN else recipe.tuner.train_type
    expected = WRITTEN.get(key, "base_model.model.model.")
    assert any(name.startswith(expected) for name in written), sorted(written)[:5]
    assert ("base_model" in next(iter(written))) == (recipe.tuner.train_type not in ("full", "llamapro"))


def test_recipes_that_need_more_are_tried_where_it_says():
    for name, file in ELSEWHERE.items():
        assert name in (Path(__file__).parent / file).read_text()
