"""Loading a recipe: it is found by name, typed, saved and loaded again; loading writes nothing."""

import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe import layers
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS

EVERY_KIND = """
global_max_length: 2048
model: {model: some/model, device_map: {"": 0, model.visual: cpu}, max_memory: {0: 40GB, cpu: 100GB},
        rope_scaling: {type: yarn, factor: 2.0}}
data: {train: [a.jsonl, b%50], val: b.jsonl, datasets: {b: {annotation_path: b.json, data_path: ""}}}
template: {system_prompt: "line one\\nline two: yes"}
tuner: {target_modules: [q_proj, v_proj], target_regex: '^.*\\.(q|k)_proj$'}
training: {learning_rate: 1e-5, max_steps: 5, eval_strategy: steps, report_to: [tensorboard, wandb], fp16: false,
           lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-7}}
"""


def test_a_saved_recipe_loads_to_the_same_recipe(write, tmp_path):
    recipe = load_recipe(write("a.yaml", EVERY_KIND))
    recipe.save(tmp_path / "run" / "recipe.yaml")
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert load_recipe(tmp_path / "run" / "recipe.yaml", ["training.max_steps=6"]) != recipe, "vacuous: all are equal"
    head = (tmp_path / "run" / "recipe.yaml").read_text().splitlines()
    assert any(line.startswith("# transformers 5") for line in head)
    assert any(line.startswith("# git ") for line in head)
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "recipe.yaml"]


def test_any_text_survives_saving_and_loading(tmp_path):
    """Texts that YAML reads as something else, interpolations, backslashes, other scripts, random text."""
    chance = random.Random(1)
    letters = string.printable.replace("\r", "").replace("\x0b", "").replace("\x0c", "") + "é图😀\\${}"
    texts = ["1e-5", "no", "007", "2024-01-01", "1_000", "a: b", "# c", "${x}", r"\${x}", r"\\${x} \\", "${", "???"]
    texts += ["".join(chance.choices(letters, k=12)) for _ in range(60)]
    recipe = load_recipe()
    for text in texts:
        recipe.template.system_prompt = text
        recipe.training.arguments["run_name"] = text
        recipe.save(tmp_path / "a.yaml")
        again = load_recipe(tmp_path / "a.yaml")
        assert again.template.system_prompt == text
        assert again.training.arguments["run_name"] == text


def test_a_secret_is_used_but_never_saved(write, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    recipe = load_recipe(write("a.yaml", "training: {hub_token: '${oc.env:MY_TOKEN}'}"))
    assert recipe.training.arguments["hub_token"] == "hf_secret"
    assert "hf_secret" not in recipe.to_yaml()


def test_recipes_are_searched_in_the_working_directory_then_beside_the_package_then_installed(
    tmp_path, monkeypatch, write
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layers, "PACKAGE_ROOT", tmp_path / "package")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    with pytest.raises(RecipeError, match=r"^there is no recipe 'mine'\. Known: \(none\)\.$"):
        load_recipe("mine")
    for number, folder in enumerate(("prefix/share/qwenvl_ft/recipes", "package/recipes", "recipes"), start=1):
        write(f"{folder}/mine.yaml", f"tuner: {{lora_rank: {number}}}")
        assert load_recipe("mine").tuner.lora_rank == number
    assert load_recipe("recipes/mine").tuner.lora_rank == 3
    assert load_recipe(Path("package/recipes/mine.yaml")).tuner.lora_rank == 2
    write("mine.yaml", "tuner: {lora_rank: 4}")
    assert load_recipe("mine.yaml").tuner.lora_rank == 4, "a file of that name comes first"
    assert load_recipe("mine").tuner.lora_rank == 3
    write("~x/mine.yaml", "")
    monkeypatch.setenv("HOME", str(tmp_path / "package"))
    assert load_recipe("~/recipes/mine.yaml").tuner.lora_rank == 2


def test_an_empty_file_gives_the_defaults_of_the_schema(write):
    recipe = load_recipe()
    assert recipe == load_recipe(write("a.yaml", "")) == load_recipe(write("b.yaml", "tuner:\ndata:\n"))
    assert recipe.training.arguments == HF_DEFAULTS
    assert all(getattr(recipe, name) == kind(**arguments(name)) for name, kind in SECTIONS.items())
    assert (recipe.tuner.lora_rank, recipe.tuner.lora_alpha, recipe.tuner.lora_dropout) == (8, 32, 0.05)
    assert (recipe.tuner.freeze_llm, recipe.tuner.freeze_vit, recipe.tuner.freeze_aligner) == (False, True, True)


def arguments(section):
    return {"arguments": HF_DEFAULTS} if section == "training" else {}


def test_an_evaluation_set_is_evaluated_unless_the_recipe_says_no():
    values = load_recipe(None, ["data.val=v.jsonl", "training.save_steps=40"]).training.arguments
    assert (values["eval_strategy"], values["eval_steps"]) == ("steps", 40)
    values = load_recipe(None, ["data.val=v.jsonl", "training.eval_strategy=no"]).training.arguments
    assert values["eval_strategy"] == "no"
    assert "eval_steps" not in values
    assert load_recipe().training.arguments["eval_strategy"] == "no"
    values = load_recipe(None, ["data.val=v.jsonl", "training.save_strategy=best"]).training.arguments
    assert values["metric_for_best_model"] == "eval_loss"


def test_loading_writes_nothing_and_needs_torch_only_for_keys_of_transformers(tmp_path):
    """A recipe with only our own keys must not import torch."""
    code = (
        "import sys; from qwenvl_ft.recipe.load import load_recipe; "
        "recipe = load_recipe(None, {!r}); print('torch' in sys.modules)"
    )
    seen = []
    for overrides in (["tuner.lora_rank=4", "data.train=a.jsonl"], ["training.max_steps=5"]):
        done = subprocess.run(
            [sys.executable, "-B", "-c", code.format(overrides)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(layers.PACKAGE_ROOT)},
            check=True,
        )
        seen.append(done.stdout.strip())
    assert seen == ["False", "True"]
    assert list(tmp_path.iterdir()) == []


def test_recipes_hold_data_not_code(write):
    """A YAML tag that creates an object is an error, and only OmegaConf's own resolvers exist."""
    marker = "os.path.join"
    with pytest.raises(RecipeError, match=r"a\.yaml:1: not valid YAML: could not determine a constructor"):
        load_recipe(write("a.yaml", f"data: {{train: !!python/object/apply:{marker} [a, b]}}"))
    with pytest.raises(RecipeError, match="Unsupported interpolation type eval"):
        load_recipe(write("b.yaml", "data: {train: '${eval:1+1}'}"))
    assert yaml.unsafe_load(f"!!python/object/apply:{marker} [a, b]") == "a/b", "vacuous: the tag does nothing"


def test_an_override_inside_a_mapping_sets_the_key_that_it_names():
    """Module names contain dots; an alias of a mapping or of its section sets the mapping."""
    recipe = load_recipe(
        None,
        [
            "model.device_map.model.visual=cpu",
            "model.device_map.model.layers.0-15=0",
            "training.gradient_checkpointing_kwargs.every_n_layers=2",
            "custom.datasets.a.annotation_path=a.jsonl",
        ],
    )
    assert recipe.model.device_map == {"model.visual": "cpu", "model.layers.0-15": 0}
    assert recipe.training.arguments["activation_checkpointing_kwargs"] == {"every_n_layers": 2}
    assert recipe.data.datasets == {"a": {"annotation_path": "a.jsonl"}}
