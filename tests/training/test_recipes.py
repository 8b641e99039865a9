"""Every shipped recipe trains two steps on the tiny model of its kind, without its settings for GPUs."""

import json
from pathlib import Path

import pytest
from cases import picture
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
    lines = []
    for i in range(6):
        picture(64 + 16 * (i % 3), 64, i).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"it is {i} " * (1 + i % 3)}]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


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
    overrides = [
        f"model.model={checkpoints[kind]}",
        "model.torch_dtype=float32",
        f"data.train={data}",
        "data.val=",
        "template.max_length=256",
        "template.max_pixels=65536",
        "training.max_steps=2",
        "training.gradient_accumulation_steps=1",
        "training.per_device_train_batch_size=1",
        "training.dataloader_num_workers=0",
        "training.save_strategy=no",
        "training.eval_strategy=no",
        "training.report_to=none",
        f"training.output_dir={tmp_path / 'run'}",
        "deepspeed.enabled=false",
        "evaluation.run_after_training=false",
        *SMALLER.get(path.stem, []),
    ]
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
