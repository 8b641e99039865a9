"""The recipe of FLARE25 is the guide's, knows every data set of the catalog, and its scripts run."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from flare_cases import CASES

from qwenvl_ft.data.sources.mixture import load_mixture
from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.catalog import FLARE_DATASETS, converted_file, registry_name, select
from qwenvl_ft.flare.convert import main as convert
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_the_recipe_names_every_data_set_and_split():
    assert load_recipe("flare25").data.datasets == {
        registry_name(name, split): {"annotation_path": f"converted_data/{converted_file(name, split)}"}
        for split in ("train", "val")
        for name in FLARE_DATASETS
    }
    assert load_recipe("flare25").data.train == ",".join(map(registry_name, select(starter=True)))


def test_the_recipe_is_what_the_guide_says():
    recipe = load_recipe("flare25")
    arguments = recipe.training.arguments
    assert recipe.model.model == "Qwen/Qwen3-VL-4B-Instruct"
    template = recipe.template
    assert (template.max_length, template.min_pixels, template.max_pixels) == (4096, 784, 50176)
    tuner = recipe.tuner
    assert (tuner.train_type, tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner) == ("full", False, False, False)
    assert recipe.training.learning_rate == 1e-5
    assert {key: arguments[key] for key in (*EXPECTED, "activation_checkpointing")} == EXPECTED | {
        "activation_checkpointing": True
    }
    assert (recipe.deepspeed.enabled, recipe.deepspeed.config) == (True, "zero3_offload")


EXPECTED = {
    "output_dir": "./output/qwen3vl_flare25_starter",
    "run_name": "qwen3vl_flare25_starter",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "wandb",
}


def test_the_guides_changes_are_flags():
    words = "recipe=flare25 --dataset_use flare_retino%100,flare_iugc%50 --eval_dataset_use flare_retino_val"
    more = "--max_pixels 25088 --min_pixels 392 --max_grad_norm 0.5 --num_train_epochs 2.0 --eval_strategy steps"
    rest = "--eval_steps 500 --per_device_eval_batch_size 1 --save_steps 500 --bf16 --gradient_checkpointing True"
    recipe = recipe_from_argv(f"{words} {more} {rest} --warmup_ratio 0.05 --learning_rate 5e-6".split())
    assert (recipe.data.train, recipe.data.val) == ("flare_retino%100,flare_iugc%50", "flare_retino_val")
    assert (recipe.template.max_pixels, recipe.template.min_pixels) == (25088, 392)
    arguments = recipe.training.arguments
    assert (arguments["max_grad_norm"], arguments["num_train_epochs"], arguments["eval_steps"]) == (0.5, 2.0, 500)
    assert (arguments["save_steps"], arguments["bf16"], arguments["warmup_steps"]) == (500, True, 0.05)
    assert recipe.training.learning_rate == 5e-6


def test_the_scripts_variables_reach_the_recipe(tmp_path):
    shim = tmp_path / "torchrun"
    shim.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    shim.chmod(0o755)
    variables = {"NPROC_PER_NODE": "4", "batch_size": "2", "grad_accum_steps": "8", "lr": "2e-5", "output_dir": "o"}
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables | {"datasets": "flare_cmmd"}
    script = RECIPES / "sft_qwen3_4b_flare.sh"
    done = subprocess.run([script, "--max_pixels", "100352"], env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:5] == ["--nproc_per_node", "4", "--standalone", "-m", "qwenvl_ft.train"]
    recipe = recipe_from_argv(words[5:])
    arguments = recipe.training.arguments
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (2, 8)
    assert (recipe.training.learning_rate, recipe.template.max_pixels) == (2e-5, 100352)
    assert (arguments["output_dir"], recipe.data.train) == ("o", "flare_cmmd")


@pytest.fixture
def converted(tree, monkeypatch):
    """A folder with converted_data: 20 cases of three photographs, so that a tenth is two."""
    tree.fill(CASES[:1] * 20)
    assert convert(["--input_dir", str(tree.base), "--datasets", "neojaundice", "--splits", "train"]) == 0
    return tree.base.parent


@pytest.fixture
def temporary():
    """A folder with a short path, as loader workers need it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_recipe_trains_from_another_folder_by_one_setting(converted, tmp_path, monkeypatch):
    """The data are in FLARE25/converted_data, the run starts elsewhere."""
    (tmp_path / "FLARE25").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (converted / "converted_data").rename(tmp_path / "FLARE25/converted_data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["recipe=flare25", "data.train=flare_neojaundice"]
    with pytest.raises(DataError, match=r"neojaundice_train.json"):
        load_mixture(recipe_from_argv(words).data, 1)
    for root in ("../FLARE25", str(tmp_path / "FLARE25")):
        train, _ = load_mixture(recipe_from_argv([*words, f"data.datasets_root={root}"]).data, 1)
        assert len(train) == 20
        assert Path(train[0][0]["image"][0]).is_file()


def dry_run(folder, temporary, tiny_dir, *arguments):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "TMPDIR": str(temporary), "ACCELERATE_USE_CPU": "true"}
    small = [f"model.model={tiny_dir}", "model.torch_dtype=float32", "deepspeed.enabled=false", *arguments]
    return subprocess.run([RECIPES / "dry_run.sh", *small], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.soak
@pytest.mark.slow
def test_a_dry_run_takes_five_steps_and_keeps_nothing(converted, temporary, tiny_dir):
    done = dry_run(converted, temporary, tiny_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN: flare25, 5 steps on flare_neojaundice%10" in done.stdout
    assert "DRY RUN PASSED: 5 steps in" in done.stdout
    assert done.stdout.count("loss ") >= 5
    assert not list(temporary.iterdir())
    assert not (converted / "output").exists()


@pytest.mark.soak
@pytest.mark.slow
def test_a_dry_run_that_fails_says_what_helps(converted, temporary, tiny_dir):
    done = dry_run(converted, temporary, tiny_dir, "data.train=flare_retino")
    assert done.returncode == 1
    assert "DRY RUN FAILED after 0 of 5 steps" in done.stdout
    assert "qwenvl-ft convert flare" in done.stdout
    assert "error: " in done.stderr
    assert not list(temporary.iterdir())


def test_the_data_test_of_the_guide_ends_with_its_summary(full_tree, tiny_dir, monkeypatch, capsys):
    """On the synthetic tree; then with an image removed and one truncated."""
    script = RECIPES.parent / "examples/flare25/test_data_loading.py"
    assert convert(["--input_dir", str(full_tree.base), "--splits", "train"]) == 0
    monkeypatch.chdir(full_tree.base.parent)
    monkeypatch.setattr(sys, "argv", [str(script), f"model.model={tiny_dir}", "template.max_length=4096"])

    def summary():
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(script), run_name="__main__")
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert not [line for line in lines if "nothing reads the key" in line], "the converter's own keys"
        return ending.value.code, lines[lines.index("TEST SUMMARY") :]

    code, lines = summary()
    files = [json.loads(path.read_text()) for path in Path("converted_data").glob("*_train.json")]
    assert code == 0
    assert {"Annotation Tests: PASSED", "Image Tests: PASSED", "Model Tests: PASSED", "Datasets: 5"} <= set(lines)
    assert f"Total samples: {sum(map(len, files))}" in lines
    assert f"Images tested: {sum(len(record['image']) for records in files for record in records)}" in lines
    assert lines[-1] == "ALL TESTS PASSED - Ready for training"
    first, second = (Path(records[0]["image"][0]) for records in files[:2])
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    code, lines = summary()
    assert code == 1
    assert {"Annotation Tests: PASSED", "Image Tests: FAILED", "Missing: 1", "Corrupted: 1"} <= set(lines)
