"""Aliases, flags and environment variables of ms-swift and train_qwen.py mean the same here."""

import shlex
from dataclasses import fields

import pytest
from recipe_cases import value_of
from transformers import TrainingArguments

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.dialects import ALIASES, ENVIRONMENT, REMOVED
from qwenvl_ft.recipe.keys import argument_types, bare_names, own_types, type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import SECTIONS

MEANINGS = {
    "model": ("m", {"model.model": "m"}),
    "dataset": ("a%50,b", {"data.train": "a%50,b"}),
    "val_dataset": ("v", {"data.val": "v"}),
    "group_by_length": ("true", {"training.train_sampling_strategy": "group_by_length"}),
    "dataset_test_ratio": ("0.01", {"data.split_dataset_ratio": 0.01}),
    "jsonl": ("a.jsonl", {"data.train": "a.jsonl"}),
    "train_jsonl": ("a.jsonl", {"data.train": "a.jsonl"}),
    "val_jsonl": ("v.jsonl", {"data.val": "v.jsonl"}),
    "system": ("Be brief", {"template.system_prompt": "Be brief"}),
    "user_prompt": ("Which?", {"prompts.user": "Which?"}),
    "system_prompt_summary": ("One line.", {"prompts.system_summary": "One line."}),
    "template_type": ("qwen", {"template.template": "qwen"}),
    "sft_type": ("full", {"tuner.train_type": "full"}),
    "tuner_type": ("full", {"tuner.train_type": "full"}),
    "init_lora_weights": ("pissa", {"tuner.init_weights": "pissa"}),
    "resume_only_model": ("true", {"training.resume_weights_only": True}),
    "optimizer": ("adamw_torch", {"training.optim": "adamw_torch", "training.optimizer": "multimodal"}),
    "zero_hpz_partition_size": ("8", {"deepspeed.zero_hpz_partition_size": 8}),
    "deepspeed": ("zero3_offload", {"deepspeed.enabled": True, "deepspeed.config": "zero3_offload"}),
    "debug": ("underflow_overflow", {"training.debug": "underflow_overflow"}),
    "model_name_or_path": ("m", {"model.model": "m"}),
    "dataset_use": ("a%50,b", {"data.train": "a%50,b"}),
    "eval_dataset_use": ("v", {"data.val": "v"}),
    "model_max_length": ("4096", {"template.max_length": 4096}),
    "max_seq_length": ("4096", {"template.max_length": 4096}),
    "use_lora": ("False", {"tuner.train_type": "full"}),
    "lora_enable": ("True", {"tuner.train_type": "lora"}),
    "lora_r": ("64", {"tuner.lora_rank": 64}),
    "train_modules": ("q_proj", {"tuner.target_modules": ["q_proj"]}),
    "tune_mm_llm": ("True", {"tuner.freeze_llm": False}),
    "tune_mm_vision": ("True", {"tuner.freeze_vit": False}),
    "tune_mm_mlp": ("True", {"tuner.freeze_aligner": False}),
    "train_mlp": (
        "True",
        {
            "tuner.freeze_aligner": False,
            "tuner.modules_to_save": ["model.visual.merger", "model.visual.deepstack_merger_list"],
        },
    ),
    "image_max_token_num": ("49", {"template.max_pixels": 50176}),
    "image_min_token_num": ("4", {"template.min_pixels": 4096}),
    "video_max_token_num": ("128", {"template.video_frame_max_pixels": 131072}),
    "video_fps": ("1.5", {"template.fps": 1.5}),
    "video_max_frames": ("8", {"template.fps_max_frames": 8}),
    "video_min_frames": ("2", {"template.fps_min_frames": 2}),
    "freeze_vision": ("False", {"tuner.freeze_vit": False}),
    "mm_projector_lr": ("1e-5", {"training.aligner_lr": 1e-5}),
    "vision_tower_lr": ("1e-6", {"training.vit_lr": 1e-6}),
    "data_packing": ("False", {"training.packing": False}),
    "data_flatten": ("True", {"training.padding_free": True, "training.packing": False}),
    "evaluation_strategy": ("no", {"training.eval_strategy": "no"}),
    "warmup_ratio": ("0.03", {"training.warmup_steps": 0.03}),
    "gradient_checkpointing": ("False", {"training.activation_checkpointing": False}),
    "gradient_checkpointing_kwargs": (
        '{"use_reentrant": false}',
        {"training.activation_checkpointing_kwargs": {"use_reentrant": False}},
    ),
}


NEEDED = {"zero_hpz_partition_size": ["deepspeed.enabled=true"]}
"""Alias -> settings without which a run does not read it."""


def test_every_alias_has_its_expected_meaning_here():
    assert MEANINGS.keys() == ALIASES.keys()


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_means_the_same_as_flag_override_and_in_a_file(name, write):
    word, meaning = MEANINGS[name]
    alias = ALIASES[name]
    assert all(type_of(key) is not None for key in alias.keys), "it stands for a key that does not exist"
    needed = NEEDED[name] if name in NEEDED else []
    flag = recipe_from_argv([f"--{name}", word, *needed])
    assert {key: value_of(flag, key) for key in meaning} == meaning
    for section in sorted(alias.sections):
        override = load_recipe(None, [f"{section}.{name}={word}", *needed])
        file = load_recipe(write("a.yaml", f"{section}:\n  {name}: '{word}'"), needed)
        direct = {key: value for key, value in meaning.items() if key in alias.keys}
        for recipe in (override, file):
            assert {key: value_of(recipe, key) for key in direct} == direct
    if name not in ("lora_enable", "evaluation_strategy"):  # their word is the default
        assert flag != load_recipe(), "vacuous: the flag changes nothing"


def test_environment_variables_override_files_and_yield_to_overrides(write, monkeypatch):
    path = write("a.yaml", "template: {max_pixels: 999424, fps: 1, max_length: 9000}")
    for variable in ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    assert load_recipe(path).template.max_pixels == 999424
    for number, variable in enumerate(ENVIRONMENT, 1):
        key = flag_key(ENVIRONMENT[variable])
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(4 * number))
            recipe = load_recipe(path, ["data.train=a"])
            assert str(value_of(recipe, key)) in (str(4 * number), str(4096 * number))
            assert recipe.origin(key) == "environment"
            assert str(value_of(recipe_from_argv([f"--{key}", "7"]), key)) == "7"
            assert str(value_of(load_recipe(path, [f"{key}=7"]), key)) == "7"
    monkeypatch.setenv("IMAGE_MAX_TOKEN_NUM", "many")
    with pytest.raises(RecipeError, match=r"environment: IMAGE_MAX_TOKEN_NUM: 'many' is not a whole number"):
        load_recipe()


def flag_key(name):
    if "." in name:
        return name
    return ALIASES[name].keys[0] if name in ALIASES else f"template.{name}"


def test_every_key_of_ours_is_a_flag_with_and_without_its_section():
    reached = set(bare_names().values())
    for section in SECTIONS:
        for name in own_types(section):
            assert f"{section}.{name}" in reached or section in ("deepspeed", "evaluation") or name in bare_names()
    assert recipe_from_argv(["--lora_rank", "5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["--tuner.lora_rank", "5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["--lora-rank=5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["lora_rank=5"]).tuner.lora_rank == 5
    asked = recipe_from_argv(["--evaluation.limit", "5", "--evaluation.run_after_training", "--val_dataset", "v"])
    assert asked.evaluation.limit == 5
    assert recipe_from_argv(["--global_max_length", "512"]).template.max_length == 512


def test_every_field_of_training_arguments_is_a_flag():
    names = {entry.name for entry in fields(TrainingArguments) if entry.init}
    assert names == argument_types().keys()
    words = "--save_only_model --max_steps -1 --adam_beta2=0.95 --report_to wandb tensorboard"
    recipe = recipe_from_argv(words.split())
    arguments = recipe.training.arguments
    assert (arguments["save_only_model"], arguments["max_steps"], arguments["adam_beta2"]) == (True, -1, 0.95)
    assert arguments["report_to"] == ["wandb", "tensorboard"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--target_modules all-linear", ["all-linear"]),
        ("--target_modules q_proj v_proj", ["q_proj", "v_proj"]),
        ("--target_modules q_proj v_proj --bf16", ["q_proj", "v_proj"]),
        ("--target_modules q_proj v_proj recipe=lora_4b", ["q_proj", "v_proj"]),
        ("--target_modules q_proj v_proj training.max_steps=3", ["q_proj", "v_proj"]),
        ("--target_modules q_proj v_proj lora_rank=3", ["q_proj", "v_proj"]),
        ("""--target_modules '["q_proj","v_proj"]'""", ["q_proj", "v_proj"]),
        ("--target_modules '[q_proj, v_proj]'", ["q_proj", "v_proj"]),
        ("tuner.target_modules=[q_proj,v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_a_list_may_be_written_in_any_way(words, expected):
    assert recipe_from_argv(shlex.split(words)).tuner.target_modules == expected


def test_a_boolean_flag_may_stand_alone_and_takes_no_other_argument():
    words = "--bf16 recipe=lora_4b --use_dora --packing False --tune_mm_llm --use_rslora lora_rank=3"
    recipe = recipe_from_argv(words.split())
    assert recipe.training.arguments["bf16"] is True
    assert (recipe.tuner.use_dora, recipe.tuner.use_rslora, recipe.training.packing) == (True, True, False)
    assert (recipe.tuner.freeze_llm, recipe.tuner.lora_rank) == (False, 3)
    assert recipe.origin("tuner.lora_alpha").endswith("lora_4b.yaml")


def test_json_is_accepted_wherever_a_key_is_a_mapping():
    words = """--device_map '{"": 0}' --max_memory '{"0":"40GB","1":"40GB","cpu":"100GB"}'
        --rope_scaling '{"type":"yarn","factor":2.0}' --lr_scheduler_type cosine_with_min_lr
        --lr_scheduler_kwargs '{"min_lr": 1e-6}'"""
    recipe = recipe_from_argv(shlex.split(words))
    assert recipe.model.device_map == {"": 0}
    assert recipe.model.max_memory == {"0": "40GB", "1": "40GB", "cpu": "100GB"}
    assert recipe.model.rope_scaling == {"type": "yarn", "factor": 2.0}
    assert recipe.training.arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert recipe_from_argv(["--rope_scaling", "yarn", "--device_map", "auto"]).model.rope_scaling == "yarn"


def test_no_removed_name_is_a_valid_key():
    """A version of transformers that brings one back must not be overruled."""
    assert REMOVED
    assert not REMOVED.keys() & (argument_types().keys() | ALIASES.keys() | bare_names().keys())


def test_both_spellings_name_a_file_and_the_base_is_weaker(write):
    base = write("base.yaml", "tuner: {lora_rank: 1, lora_alpha: 1, lora_dropout: 0.1}")
    top = write("top.yaml", "tuner: {lora_rank: 2, lora_alpha: 2}")
    for words in (f"--lora_rank 3 --config {top} --base_config {base}", f"recipe={top} base_config={base} lora_rank=3"):
        tuner = recipe_from_argv(words.split()).tuner
        assert (tuner.lora_rank, tuner.lora_alpha, tuner.lora_dropout) == (3, 2, 0.1)


def test_null_disables_deepspeed():
    assert recipe_from_argv(["recipe=sft_4b"]).deepspeed.enabled
    for word in ("null", "None", ""):
        assert not recipe_from_argv(["recipe=sft_4b", f"--deepspeed={word}"]).deepspeed.enabled
