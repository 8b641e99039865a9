"""Every shipped recipe loads, and every shipped script runs."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import DataConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
YAML = sorted(RECIPES.glob("*.yaml"))
SCRIPTS = sorted(RECIPES.glob("*.sh"))
LAUNCHERS = [path for path in SCRIPTS if path.stem not in ("dry_run", "train", "launch", "slurm")]
DEEPSPEED = sorted((RECIPES / "deepspeed").glob("*.json"))
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))


def stem(path):
    return path.stem


def test_the_expected_files_are_there():
    assert {
        "base",
        "digits",
        "sft_4b",
        "sft_8b",
        "lora_4b",
        "stage_1_aligner",
        "stage_2_llm_aligner",
        "flare25",
    } <= set(map(stem, YAML))
    assert "curriculum" in set(map(stem, YAML))
    assert {"sft_4b", "sft_8b", "lora_4b", "sft_7b", "sft_qwen3_4b_flare", "dry_run"} <= set(map(stem, SCRIPTS))
    assert set(map(stem, DEEPSPEED)) == {"zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert {"ddp", "fsdp2"} <= set(map(stem, ACCELERATE))


@pytest.mark.parametrize("path", YAML, ids=stem)
def test_a_recipe_loads_and_transformers_accepts_its_arguments(path, tmp_path):
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path)
    assert recipe.model.model
    values = recipe.training.arguments | {"output_dir": str(tmp_path), "use_cpu": True}
    values["dataloader_num_workers"] = 0  # auto, until the cores are known
    arguments = TrainingArguments(**values)
    assert arguments.lr_scheduler_type == recipe.training.arguments["lr_scheduler_type"]


@pytest.mark.parametrize("path", [*YAML, *ACCELERATE], ids=stem)
def test_a_recipe_opens_with_what_it_does_the_command_and_what_to_expect(path):
    lines = path.read_text().splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    assert opening[0].startswith("# ")
    text = "\n".join(opening)
    assert "recipe=" in text or "make demo" in text
    assert "# Expect:" in text
    for command in re.findall(r"recipe=(\S+)", text):
        assert command == "mine" or load_recipe(command)


@pytest.mark.parametrize("path", YAML, ids=stem)
def test_the_command_that_a_recipe_names_runs_it(path):
    commands = re.findall(r"-m qwenvl_ft\.train (recipe=\S+.*)", path.read_text())
    assert commands or path.stem == "digits"
    for command in commands:
        if "recipe=mine" not in command:
            words = command.split("   ")[0].split()
            expected = "my.jsonl" if "data.train" in command else load_recipe(path).data.train
            assert recipe_from_argv(words).data.train == expected != ""


def test_base_documents_the_sections_and_can_be_copied(tmp_path):
    text = (RECIPES / "base.yaml").read_text()
    assert set(yaml.safe_load(text)) == {"model", "template", "data", "tuner", "training", "deepspeed", "evaluation"}
    copy = tmp_path / "mine.yaml"
    copy.write_text(text)
    assert load_recipe(copy) == load_recipe("base")
    offered = re.sub(r"^( *)# ((?:- )?[a-z_]+: )", r"\1\2", text, flags=re.MULTILINE)
    offered = offered.replace("#   a: {annotation_path", "  a: {annotation_path")
    copy.write_text(offered)
    recipe = load_recipe(copy)
    assert recipe != load_recipe("base"), "vacuous: nothing was offered in a comment"
    assert recipe.template.max_length == 8192
    assert recipe.data.datasets == {"a": {"annotation_path": "a.jsonl", "data_path": "images/a"}}
    assert recipe.training.arguments["save_strategy"] == "best"
    assert recipe.data != DataConfig()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_4b", ("lora", False, True, True, False)),
        ("qlora_8b", ("lora", False, True, True, False)),
        ("lora_30b_a3b", ("lora", False, True, True, True)),
        ("lora_30b_a3b_experts", ("lora", False, True, True, True)),
        ("stage_1_aligner", ("lora", True, True, False, False)),
        ("stage_2_llm_aligner", ("lora", False, True, False, False)),
        ("sft_4b", ("full", False, False, False, True)),
        ("sft_8b", ("full", False, False, False, True)),
        ("flare25", ("full", False, False, False, True)),
        ("digits", ("full", False, False, False, False)),
    ],
)
def test_recipes_train_the_parts_that_their_first_lines_name(name, expected):
    recipe = load_recipe(name)
    tuner = recipe.tuner
    trained = (tuner.train_type, tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner, recipe.deepspeed.enabled)
    assert trained == expected


def test_the_curriculum_unfreezes_parts_and_augments_more_in_each_phase():
    recipe = load_recipe("curriculum")
    phases = [
        (run.data.train, run.training.arguments["num_train_epochs"], run.tuner.freeze_llm, run.training.learning_rate)
        for run in recipe.phases
    ]
    assert phases == [
        ("data/full.simple.jsonl", 30, True, 1e-4),
        ("data/full.medium.jsonl", 30, False, 1e-4),
        ("data/full.jsonl", 40, False, 5e-5),
    ]
    turned = [Augmenter.from_config(run.data.augmentation) for run in recipe.phases]
    assert len({repr(augmenter) for augmenter in turned}) == 3
    folders = [run.training.arguments["output_dir"] for run in recipe.phases]
    assert folders == [f"output/curriculum/phase_{name}" for name in ("1_simple", "2_medium", "3_full")]


def autos(value):
    if isinstance(value, dict):
        return sum(map(autos, value.values()))
    return value == "auto"


@pytest.mark.parametrize("path", DEEPSPEED, ids=stem)
def test_a_deepspeed_preset_clips_gradients_and_the_trainer_fills_it_in(path, tiny_dir, tmp_path):
    from transformers import AutoConfig

    preset = json.loads(path.read_text())
    assert preset["gradient_clipping"] == "auto"
    assert preset["zero_optimization"]["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in preset["zero_optimization"]) == path.stem.endswith("_offload")
    filled = HfTrainerDeepSpeedConfig(preset)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_grad_norm=0.37, gradient_accumulation_steps=3, use_cpu=True
    )
    filled.trainer_config_process(arguments)
    model = type("Model", (), {"config": AutoConfig.from_pretrained(tiny_dir)})()
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert filled.config["gradient_clipping"] == 0.37
    assert filled.config["gradient_accumulation_steps"] == 3
    assert autos(preset) > 0
    assert autos(filled.config) == 0, "an auto value is left"


@pytest.mark.parametrize("path", ACCELERATE, ids=stem)
def test_an_accelerate_config_loads_and_names_existing_classes(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    settings = yaml.safe_load(path.read_text())
    assert str(config.distributed_type).endswith(settings["distributed_type"])
    if "fsdp_config" in settings:
        for name in settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(","):
            assert hasattr(modeling_qwen3_vl, name)


@pytest.mark.parametrize("path", LAUNCHERS, ids=stem)
@pytest.mark.parametrize("gpus", [None, "3"])
def test_a_script_launches_its_recipe_and_passes_all_arguments_on(path, gpus, tmp_path):
    """With a stand-in for torchrun that prints its arguments, from another folder."""
    shim = tmp_path / "torchrun"
    shim.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    shim.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("NGPU", "NPROC_PER_NODE")}
    env |= {"NGPU": gpus} if gpus else {}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    mine = ["data.train=my file.jsonl", "training.learning_rate=5e-6"]
    done = subprocess.run([path, *mine], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[0] == "--nproc_per_node"
    assert words[2] == "--standalone"
    processes = {"lora_4b": "1", "sft_qwen3_4b_flare": "1"}
    expected = gpus or (processes[path.stem] if path.stem in processes else "8")
    assert words[1] == expected
    assert words[words.index("-m") + 1] == "qwenvl_ft.train"
    recipe = recipe_from_argv(words[words.index("-m") + 2 :])
    assert (recipe.data.train, recipe.training.learning_rate) == ("my file.jsonl", 5e-6)
    size = re.search(r"30a3b|\d+b", path.stem).group().upper().replace("7B", "8B").replace("30A", "30B-A")
    assert recipe.model.model == f"Qwen/Qwen3-VL-{size}-Instruct"
    assert ("There is no Qwen3-VL-7B" in done.stderr) == (path.stem == "sft_7b")


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["config=lora_4b"], {}, ("python", "0", [])),
        (["recipe=lora_4b", "gpus=3"], {}, ("python", "3", [])),
        (["config=lora_4b", "gpus=0,2,5"], {}, ("torchrun", "0,2,5", ["--nproc_per_node", "3"])),
        ([], {"config": "lora_4b", "gpus": "1,2"}, ("torchrun", "1,2", ["--nproc_per_node", "2"])),
        (["gpus="], {"config": "lora_4b"}, ("python", "", [])),
    ],
)
def test_train_starts_python_for_one_gpu_and_torchrun_for_several(words, environment, expected, tmp_path):
    launcher, gpus, first = expected
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$CUDA_VISIBLE_DEVICES" "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
    command = [RECIPES / "train.sh", *words, "data.train=my file.jsonl"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words == [launcher, gpus, *first, "-m", "qwenvl_ft.train", "recipe=lora_4b", "data.train=my file.jsonl"]


def test_train_without_a_recipe_says_so():
    done = subprocess.run([RECIPES / "train.sh", "gpus=0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: name a recipe: recipes/train.sh config=mine.yaml gpus=0\n"


def test_the_table_lists_every_file_and_links_to_none_that_is_missing():
    text = (RECIPES / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#]+)\)", text))
    for path in (*YAML, *SCRIPTS, *DEEPSPEED, *ACCELERATE):
        assert str(path.relative_to(RECIPES)) in linked
    for link in linked:
        assert (RECIPES / link).exists(), link
