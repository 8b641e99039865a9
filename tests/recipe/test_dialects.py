"""The flags of ms-swift and train_qwen.py say here what they say there."""

import shlex
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.dialects import ALIASES, ENVIRONMENT, REMOVED, UPSTREAM
from qwenvl_ft.recipe.keys import argument_types, bare_names, own_types, type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import SECTIONS


def value_of(recipe, key):
    section, _, name = key.partition(".")
    values = getattr(recipe, section)
    return values.arguments[name] if section == "training" and name in values.arguments else getattr(values, name)


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


def test_every_other_name_has_its_meaning_written_down_here():
    assert MEANINGS.keys() == ALIASES.keys()


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_means_the_same_as_a_flag_an_override_and_in_a_file(name, write):
    word, meaning = MEANINGS[name]
    alias = ALIASES[name]
    assert all(type_of(key) is not None for key in alias.keys), "it stands for a key that does not exist"
    flag = recipe_from_argv([f"--{name}", word])
    assert {key: value_of(flag, key) for key in meaning} == meaning
    for section in sorted(alias.sections):
        override = load_recipe(None, [f"{section}.{name}={word}"])
        file = load_recipe(write("a.yaml", f"{section}:\n  {name}: '{word}'"))
        direct = {key: value for key, value in meaning.items() if key in alias.keys}
        for recipe in (override, file):
            assert {key: value_of(recipe, key) for key in direct} == direct
    if name not in ("lora_enable", "evaluation_strategy"):  # their word is the default
        assert flag != load_recipe(), "vacuous: the flag changes nothing"


def test_environment_variables_of_other_libraries_stand_between_files_and_overrides(write, monkeypatch):
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


def test_every_key_of_ours_is_a_flag_by_its_bare_name_and_by_its_dotted_one():
    reached = set(bare_names().values())
    for section in SECTIONS:
        for name in own_types(section):
            assert f"{section}.{name}" in reached or section in ("deepspeed", "evaluation") or name in bare_names()
    assert recipe_from_argv(["--lora_rank", "5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["--tuner.lora_rank", "5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["--lora-rank=5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["lora_rank=5"]).tuner.lora_rank == 5
    assert recipe_from_argv(["--evaluation.limit", "5"]).evaluation.limit == 5
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
def test_a_list_has_any_spelling(words, expected):
    assert recipe_from_argv(shlex.split(words)).tuner.target_modules == expected


def test_a_truth_value_may_stand_without_one_and_takes_no_foreign_word():
    words = "--bf16 recipe=lora_4b --use_dora --packing False --tune_mm_llm --use_rslora lora_rank=3"
    recipe = recipe_from_argv(words.split())
    assert recipe.training.arguments["bf16"] is True
    assert (recipe.tuner.use_dora, recipe.tuner.use_rslora, recipe.training.packing) == (True, True, False)
    assert (recipe.tuner.freeze_llm, recipe.tuner.lora_rank) == (False, 3)
    assert recipe.origin("tuner.lora_alpha").endswith("lora_4b.yaml")


def test_json_is_a_mapping_wherever_one_is_wanted():
    words = """--device_map '{"": 0}' --max_memory '{"0":"40GB","1":"40GB","cpu":"100GB"}'
        --rope_scaling '{"type":"yarn","factor":2.0}' --lr_scheduler_type cosine_with_min_lr
        --lr_scheduler_kwargs '{"min_lr": 1e-6}'"""
    recipe = recipe_from_argv(shlex.split(words))
    assert recipe.model.device_map == {"": 0}
    assert recipe.model.max_memory == {"0": "40GB", "1": "40GB", "cpu": "100GB"}
    assert recipe.model.rope_scaling == {"type": "yarn", "factor": 2.0}
    assert recipe.training.arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert recipe_from_argv(["--rope_scaling", "yarn", "--device_map", "auto"]).model.rope_scaling == "yarn"


def test_a_removed_name_is_none_that_still_means_something():
    """A transformers that brings one back must not be contradicted."""
    assert REMOVED
    assert not REMOVED.keys() & (argument_types().keys() | ALIASES.keys() | bare_names().keys())


def test_files_are_named_in_both_ways_and_the_base_is_weaker(write):
    base = write("base.yaml", "tuner: {lora_rank: 1, lora_alpha: 1, lora_dropout: 0.1}")
    top = write("top.yaml", "tuner: {lora_rank: 2, lora_alpha: 2}")
    for words in (f"--lora_rank 3 --config {top} --base_config {base}", f"recipe={top} base_config={base} lora_rank=3"):
        tuner = recipe_from_argv(words.split()).tuner
        assert (tuner.lora_rank, tuner.lora_alpha, tuner.lora_dropout) == (3, 2, 0.1)


def test_deepspeed_is_switched_off_by_null():
    assert recipe_from_argv(["recipe=sft_4b"]).deepspeed.enabled
    for word in ("null", "None", ""):
        assert not recipe_from_argv(["recipe=sft_4b", f"--deepspeed={word}"]).deepspeed.enabled


RECOMMENDED = """--model /models/qwen3-vl --torch_dtype bfloat16 --attn_impl flash_attn --train_type lora --lora_rank 8
    --lora_alpha 32 --lora_dropout 0.05 --target_modules all-linear --freeze_llm false --freeze_vit true
    --freeze_aligner true --learning_rate 1e-4 --num_train_epochs 3 --per_device_train_batch_size 1
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 16 --warmup_ratio 0.05 --weight_decay 0.01
    --lr_scheduler_type cosine --gradient_checkpointing true --max_length 2048 --truncation_strategy right
    --padding_free true --eval_strategy steps --eval_steps 200 --save_strategy steps --save_steps 500
    --save_total_limit 2 --jsonl train.jsonl --val_jsonl val.jsonl --dataset_num_proc 4 --dataloader_num_workers 2
    --output_dir ./output/qwen3vl_lora --logging_steps 10"""


def test_the_recommended_dense_caption_command_is_understood():
    recipe = recipe_from_argv(RECOMMENDED.split())
    assert (recipe.model.model, recipe.model.attn_impl) == ("/models/qwen3-vl", "flash_attn")
    assert (recipe.tuner.train_type, recipe.tuner.lora_rank, recipe.tuner.target_modules) == ("lora", 8, ["all-linear"])
    assert (recipe.template.max_length, recipe.template.truncation_strategy) == (2048, "right")
    assert (recipe.data.train, recipe.data.val, recipe.data.dataset_num_proc) == ("train.jsonl", "val.jsonl", 4)
    assert (recipe.training.learning_rate, recipe.training.padding_free) == (1e-4, True)
    arguments = recipe.training.arguments
    expected = {"num_train_epochs": 3, "gradient_accumulation_steps": 16, "warmup_steps": 0.05, "weight_decay": 0.01}
    expected |= {"activation_checkpointing": True, "eval_strategy": "steps", "eval_steps": 200, "save_steps": 500}
    expected |= {"save_total_limit": 2, "dataloader_num_workers": 2, "logging_steps": 10}
    expected |= {"output_dir": "./output/qwen3vl_lora", "lr_scheduler_type": "cosine", "save_strategy": "steps"}
    assert {key: arguments[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--model m --jsonl a.jsonl --torch_dtype bfloat16 --attn_impl flash_attn --train_type lora "
            "--output_dir out",
            {"model.model": "m", "data.train": "a.jsonl", "training.output_dir": "out"},
        ),
        (
            """--lora_rank 32 --lora_alpha 64
            --target_modules '["q_proj","k_proj","v_proj","o_proj","up_proj","down_proj"]'""",
            {
                "tuner.lora_rank": 32,
                "tuner.lora_alpha": 64,
                "tuner.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            },
        ),
        (
            "--lora_rank 4 --lora_alpha 8 --gradient_accumulation_steps 32 --max_length 1024 "
            "--gradient_checkpointing true --deepspeed zero2_offload",
            {
                "tuner.lora_rank": 4,
                "tuner.lora_alpha": 8,
                "training.gradient_accumulation_steps": 32,
                "template.max_length": 1024,
                "training.activation_checkpointing": True,
                "deepspeed.enabled": True,
                "deepspeed.config": "zero2_offload",
            },
        ),
        (
            "--lora_rank 16 --lora_alpha 32 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 "
            "--deepspeed zero2",
            {
                "tuner.lora_rank": 16,
                "training.per_device_train_batch_size": 4,
                "training.gradient_accumulation_steps": 4,
                "deepspeed.config": "zero2",
            },
        ),
        (
            """--optimizer adamw_torch --learning_rate 1e-4 --adam_beta1 0.9 --adam_beta2 0.999 --adam_epsilon 1e-8
            --max_grad_norm 1.0 --warmup_steps 100 --max_steps 10000 --fp16 false --bf16 true --fp16_full_eval false
            --neftune_noise_alpha 5 --auto_find_batch_size true --modules_to_save embed_tokens lm_head
            --logging_first_step true --report_to wandb --save_only_model true --push_to_hub false
            --packing true --padding_free true --max_model_len 4096 --model_revision main --model_type qwen3_vl
            --template_type qwen --tools_prompt '[]' --use_rslora --use_dora""",
            {
                "training.optim": "adamw_torch",
                "training.adam_epsilon": 1e-8,
                "training.warmup_steps": 100,
                "training.bf16": True,
                "training.neftune_noise_alpha": 5,
                "training.push_to_hub": False,
                "tuner.modules_to_save": ["embed_tokens", "lm_head"],
                "template.tools_prompt": "[]",
            },
        ),
        (
            """--model_name_or_path Qwen/Qwen3-VL-30B-A3B-Instruct --use_lora True --lora_rank 128 --lora_alpha 256
            --lora_dropout 0.05 --train_modules q_proj v_proj --packing True --max_seq_length 8192
            --pack_dataset_break_mode no_break_longest_only --learning_rate 5e-5 --lr_scheduler_type cosine
            --warmup_ratio 0.03 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --bf16 True
            --optim adamw_torch --weight_decay 0.01 --freeze_vision True --freeze_llm False
            --gradient_checkpointing True --bf16_full_eval False --deepspeed scripts/zero3_offload.json""",
            {
                "tuner.train_type": "lora",
                "tuner.lora_rank": 128,
                "tuner.target_modules": ["q_proj", "v_proj"],
                "tuner.freeze_vit": True,
                "template.max_length": 8192,
                "training.pack_dataset_break_mode": "no_break_longest_only",
                "deepspeed.config": "scripts/zero3_offload.json",
            },
        ),
    ],
    ids=["minimal", "higher quality", "less memory", "fastest", "summary", "train_qwen"],
)
def test_the_commands_of_the_guides_are_understood(words, expected):
    recipe = recipe_from_argv(shlex.split(words))
    assert {key: value_of(recipe, key) for key in expected} == expected


OFFICIAL = """--model_name_or_path Qwen/Qwen3-VL-4B-Instruct --dataset_use a%50,b --data_flatten True
    --tune_mm_vision False --tune_mm_mlp True --tune_mm_llm True --bf16 --output_dir out --num_train_epochs 0.5
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --max_pixels 50176 --min_pixels 784
    --eval_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 1 --learning_rate 1e-5
    --mm_projector_lr 2e-5 --vision_tower_lr 1e-6 --weight_decay 0 --warmup_ratio 0.03 --max_grad_norm 1
    --lr_scheduler_type cosine --logging_steps 1 --model_max_length 8192 --gradient_checkpointing True
    --dataloader_num_workers 4 --run_name baseline --report_to wandb"""


def test_an_official_script_means_its_own_defaults():
    """It trains the named parts in full and packs only when it says so; a recipe file outweighs that."""
    recipe = recipe_from_argv(OFFICIAL.split())
    tuner = recipe.tuner
    assert (tuner.train_type, tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner) == ("full", False, True, False)
    assert (recipe.training.packing, recipe.training.aligner_lr, recipe.training.vit_lr) == (False, 2e-5, 1e-6)
    assert recipe.origin("tuner.train_type") == "train_qwen.py"
    only_llm = recipe_from_argv(["--tune_mm_llm", "True"]).tuner
    assert (only_llm.freeze_vit, only_llm.freeze_aligner) == (True, True)
    assert recipe_from_argv([*OFFICIAL.split(), "--lora_enable", "True", "--lora_r", "64"]).tuner.train_type == "lora"
    assert recipe_from_argv([*OFFICIAL.split(), "--data_packing", "True"]).training.packing
    assert recipe_from_argv(["--tune_mm_llm", "True", "recipe=lora_4b"]).tuner.train_type == "lora"
    assert recipe_from_argv([]).tuner.train_type == "lora", "vacuous: full is the default anyway"
    assert all(name in ALIASES for name in UPSTREAM)
    assert all(type_of(key) is not None for defaults in UPSTREAM.values() for key in defaults)


def test_lora_on_the_llm_with_the_projection_in_full(tiny_dir):
    """Exactly these train: adapters in the language model, and all four mergers in full."""
    from qwenvl_ft.model.load import load_model
    from qwenvl_ft.tuning.prepare import prepare_model

    words = "--use_lora True --train_mlp True --freeze_vision True --freeze_llm False"
    model = prepare_model(load_model(str(tiny_dir), torch_dtype="float32"), recipe_from_argv(words.split()).tuner)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    mergers = [name for name in trained if "merger" in name]
    assert mergers
    assert all("modules_to_save" in name and "lora_" not in name for name in mergers)
    assert {index for index in "012" if any(f"deepstack_merger_list.{index}." in name for name in mergers)} == set(
        "012"
    )
    assert all("lora_" in name and "language_model" in name for name in trained if name not in mergers)
    assert len(mergers) < len(trained)
