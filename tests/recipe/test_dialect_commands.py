"""Whole commands written for ms-swift, train_qwen.py and the guides mean the same here."""

import shlex

import pytest
from recipe_cases import value_of

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.dialects import SAME_ANYWAY
from qwenvl_ft.recipe.load import load_recipe

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
                "template.tools_prompt": [],
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


def test_flags_of_train_qwen_bring_its_defaults():
    """The named parts train in full, and packing is off by default; a recipe file overrides that."""
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


@pytest.mark.parametrize("order", [1, -1])
def test_a_placeholder_beside_a_file_is_dropped_in_any_order(order):
    words = [["--jsonl", "a.jsonl"], ["--dataset", "placeholder"]][::order]
    words += [["--val_dataset", "custom"], ["--val_jsonl", "v.jsonl"]][::order]
    data = recipe_from_argv([word for pair in words for word in pair]).data
    assert (data.train, data.val) == ("a.jsonl", "v.jsonl")
    with pytest.raises(
        RecipeError, match=r"--dataset='b' and --jsonl='a\.jsonl' exclude each other: both set data\.train"
    ):
        recipe_from_argv([word for pair in [["--jsonl", "a.jsonl"], ["--dataset", "b"]][::order] for word in pair])
    assert recipe_from_argv(["--dataset", "custom"]).data.train == "custom", "without a file it may be a name"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--train_type reft --reft_layers [8, 16, 24]", "tuner.reft_layers", [8, 16, 24]),
        ("--target_modules ['q_proj', 'v_proj'] --lora_rank 4", "tuner.target_modules", ["q_proj", "v_proj"]),
        ("tuner.target_modules=['q_proj', 'v_proj'] lora_rank=4", "tuner.target_modules", ["q_proj", "v_proj"]),
        ("--target_modules=[ q_proj ,v_proj ] --lora_rank 4", "tuner.target_modules", ["q_proj", "v_proj"]),
        (
            '--device_map auto --max_memory {"0": "40GB", "cpu": "100GB"}',
            "model.max_memory",
            {"0": "40GB", "cpu": "100GB"},
        ),
        ("--system [INST --output_dir [a]", "template.system_prompt", "[INST"),
        ("--system [INST --output_dir [a]", "training.output_dir", "[a]"),
    ],
)
def test_a_list_that_the_shell_has_split_is_put_together(words, key, value):
    """shlex splits and strips quotes as a shell does."""
    assert value_of(recipe_from_argv(shlex.split(words)), key) == value


@pytest.mark.parametrize("flag", ["quant_method gptq", "quant_bits 4", "gptq_group_size 128", "quant_n_samples 128"])
def test_quantisation_after_training_is_pointed_to_its_command(flag):
    with pytest.raises(RecipeError, match=rf"--{flag.split()[0]}: .* qwenvl-ft merge .*--quantization_bit 4"):
        recipe_from_argv(["--dataset", "a", *f"--{flag}".split()])
    with pytest.raises(RecipeError, match=r"override: quantization\.quant_bits: .* qwenvl-ft merge"):
        recipe_from_argv(["quantization.quant_bits=4"])


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("tensor_parallel_size", "training.fsdp=full_shard"),
        ("tensor_model_parallel_size", "deepspeed.config=zero3"),
        ("pipeline_model_parallel_size", "training.parallelism_config.dp_shard_size"),
        ("context_parallel_size", "training.sequence_parallel_size"),
        ("expert_model_parallel_size", "shard them with all other weights"),
    ],
)
def test_parallelism_of_other_tools_is_answered_by_what_to_use(flag, instead, write):
    with pytest.raises(RecipeError) as error:
        recipe_from_argv(["--dataset", "a", f"--{flag}", "2"])
    assert str(error.value).startswith(f"--{flag}: ")
    assert instead in str(error.value)
    with pytest.raises(RecipeError, match=rf"training\.{flag}: "):
        load_recipe(write("a.yaml", f"training: {{{flag}: 2}}"))


@pytest.mark.parametrize("name", SAME_ANYWAY)
def test_a_removed_setting_is_accepted_with_the_value_that_changes_nothing(name, write):
    value = str(SAME_ANYWAY[name])
    plain = recipe_from_argv(["--dataset", "a"])
    assert recipe_from_argv(["--dataset", "a", f"--{name}", value]) == plain
    assert recipe_from_argv(["--dataset", "a", f"training.{name}={value}"]) == plain
    assert load_recipe(write("a.yaml", f"training: {{{name}: {value}}}")) == load_recipe()
    for words in (["--dataset", "a", f"--{name}", "0"], [f"training.{name}=0"]):
        with pytest.raises(RecipeError, match=name):
            recipe_from_argv(words)
