"""Files and command lines of LLaMA-Factory and 2U1 mean the same here, and each of their keys is known."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipe_cases import value_of

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.keys import argument_types, type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.tools import TOOLS

FACTORY = """
    model_name_or_path: Qwen/Qwen3-VL-4B-Instruct
    image_max_pixels: 262144
    video_max_pixels: 16384
    trust_remote_code: true
    stage: sft
    do_train: true
    finetuning_type: lora
    lora_rank: 16
    lora_target: all
    dataset: faces,other
    dataset_dir: {folder}
    template: qwen3_vl_nothink
    max_samples: 1000
    overwrite_cache: true
    output_dir: saves
    plot_loss: true
    overwrite_output_dir: true
    per_device_train_batch_size: 1
    gradient_accumulation_steps: 8
    learning_rate: 1.0e-4
    lr_scheduler_type: cosine
    warmup_ratio: 0.1
    bf16: true
    ddp_timeout: 180000000
    resume_from_checkpoint: null
    deepspeed: null
"""
INFO = {
    "faces": {
        "file_name": "faces.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "other": {"file_name": "other.json"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "hub": {"hf_hub_url": "a/b"},
    "odd": {"file_name": "odd.json", "columns": {"prompt": "ask"}},
}


@pytest.fixture
def factory(tmp_path, write):
    """``factory(*lines)`` writes the file with more lines, which replace those of the same key."""
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))

    def put(*more):
        keys = {line.partition(":")[0] for line in more}
        lines = [line.strip() for line in FACTORY.format(folder=tmp_path).strip().splitlines()]
        return write("their.yaml", "\n".join([*(line for line in lines if line.partition(":")[0] not in keys), *more]))

    return put


def test_a_file_of_llama_factory_is_read_with_its_defaults(factory, tmp_path):
    path = factory()
    recipe = recipe_from_argv(["--config", str(path)])
    assert recipe == load_recipe(path)
    expected = {
        "model.model": "Qwen/Qwen3-VL-4B-Instruct",
        "template.max_pixels": 262144,
        "template.video_frame_max_pixels": 16384,
        "template.max_length": 2048,
        "template.fps_max_frames": 128,
        "data.train": ["faces#1000", "other#1000"],
        "tuner.train_type": "lora",
        "tuner.target_modules": ["all-linear"],
        "tuner.lora_rank": 16,
        "tuner.lora_alpha": 32,
        "tuner.lora_dropout": 0.0,
        "tuner.resume_from_checkpoint": None,
        "training.packing": False,
        "training.weight_decay": 0.0,
        "training.warmup_steps": 0.1,
        "deepspeed.enabled": False,
    }
    assert {key: value_of(recipe, key) for key in expected} == expected
    assert recipe.data.datasets["faces"] == {"annotation_path": f"{tmp_path}/faces.json", "data_path": str(tmp_path)}
    assert (recipe.origin("training.packing"), recipe.origin("tuner.lora_rank")) == ("LLaMA-Factory", str(path))
    assert recipe_from_argv(["--config", str(path), "--lora_rank", "4"]).tuner.lora_rank == 4


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lora_target: q_proj,v_proj", "tuner.target_modules", ["q_proj", "v_proj"]),
        ("additional_target: lm_head", "tuner.modules_to_save", ["lm_head"]),
        ("neat_packing: true", "training.packing", True),
        ("packing: true", "training.packing", True),
        ("pissa_init: true", "tuner.init_weights", "pissa_niter_16"),
        ("flash_attn: fa2", "model.attn_impl", "flash_attention_2"),
        ("val_size: 0.1", "data.split_dataset_ratio", 0.1),
        ("eval_dataset: other", "data.val", ["other#1000"]),
        ("freeze_vision_tower: false", "tuner.freeze_vit", False),
        ("disable_gradient_checkpointing: true", "training.activation_checkpointing", False),
        ("finetuning_type: full; lora_rank: null; lora_target: null", "tuner.train_type", "full"),
        ("loraplus_lr_ratio: 16", "training.lorap_lr_ratio", 16),
    ],
)
def test_a_key_of_llama_factory_sets_ours(line, key, value, factory):
    assert value_of(load_recipe(factory(*line.split("; "))), key) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stage: dpo", r"stage: 'dpo' cannot be honoured: this package only trains on answers"),
        ("cutof_len: 5", r"cutof_len: LLaMA-Factory has no such key. Did you mean 'cutoff_len'"),
        ("finetuning_type: freeze", r"finetuning_type: 'freeze' is not mapped"),
        ("template: llama3", r"template: 'llama3' is not a template of a Qwen-VL model"),
        ("dataset: pairs", r"pairs: ranking: true is preference data"),
        ("dataset: hub", r"hub names no file"),
        ("dataset: odd", r"odd: columns.prompt=ask is not read. Rename it in the records: instruction or prompt"),
        ("dataset: facse", r"Did you mean 'faces'"),
        ("dataset_dir: nowhere", r"nowhere/dataset_info.json cannot be read"),
        ("val_size: 100", r"val_size: 100 is a number of records"),
        ("train_on_prompt: true", r"train_on_prompt: true cannot be honoured: only answers are learned"),
        ("use_unsloth: true", r"use_unsloth: true cannot be honoured"),
    ],
)
def test_what_llama_factory_has_and_we_have_not_is_one_line(line, message, factory):
    with pytest.raises(RecipeError, match=message):
        load_recipe(factory(line))


def test_a_command_line_of_llama_factory_means_the_same_as_its_file(factory):
    path = factory()
    words = []
    for line in path.read_text().splitlines():
        key, _, value = line.partition(": ")
        words += [f"--{key}", value]
    from_flags = recipe_from_argv(words)
    assert from_flags == load_recipe(path)


OTHER = """--use_liger False --lora_enable True --lora_namespan_exclude "['lm_head','embed_tokens']"
    --num_lora_modules -1 --model_id m --data_path a.json --image_folder images
    --remove_unused_columns False --freeze_vision_tower True --freeze_llm True --freeze_merger False --bf16 True
    --disable_flash_attn2 True --output_dir o --image_max_pixels 1003520 --merger_lr 1e-5 --lazy_preprocess True
    --per_device_train_batch_size 2"""


def other(*more):
    import shlex

    return recipe_from_argv([*shlex.split(OTHER), *more])


def test_a_command_line_of_2u1_is_read_with_its_defaults():
    recipe = other("--lora_rank", "32")
    expected = {
        "model.model": "m",
        "model.attn_impl": "sdpa",
        "data.train": "a.json",
        "data.media_root": "images",
        "template.max_pixels": 1003520,
        "template.min_pixels": 3136,
        "tuner.lora_rank": 32,
        "tuner.lora_alpha": 16,
        "training.aligner_lr": 1e-5,
        "training.packing": False,
        "training.learning_rate": 5e-5,
        "training.per_device_train_batch_size": 2,
        "training.per_device_eval_batch_size": 8,
    }
    assert {key: value_of(recipe, key) for key in expected} == expected
    assert recipe.origin("training.packing") == "2U1"
    assert other("--packing", "true").training.packing


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ("lora", False, True, False)),
        ("--freeze_merger True", ("lora", False, True, True)),
        ("--vision_lora True", ("lora", False, False, False)),
        ("--lora_enable False", ("full", True, True, False)),
        ("--lora_enable False --freeze_llm False --freeze_vision_tower False", ("full", False, False, False)),
    ],
)
def test_the_parts_of_2u1_train_as_there(words, parts):
    """Its ``freeze_llm`` beside LoRA freezes the base weights; ours would leave the language model without LoRA."""
    tuner = other(*words.split()).tuner
    assert (tuner.train_type, tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner) == parts
    assert bool(tuner.modules_to_save) == (words in ("", "--vision_lora True"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--freeze_llm False", "lora_enable=True needs freeze_llm=True"),
        ("--freeze_vision_tower False", "trains the vision tower in full beside LoRA"),
        ("--nframes 8", "nframes: '8' cannot be honoured"),
        ("--num_lora_modules 4", "num_lora_modules: '4' cannot be honoured"),
        ("--vision_lorra True", "unknown flag --vision_lorra"),
    ],
)
def test_what_2u1_has_and_we_have_not_is_one_line(words, message):
    with pytest.raises(RecipeError, match=message):
        other(*words.split())


@pytest.mark.parametrize("name", TOOLS)
def test_every_key_that_a_tool_sets_exists(name):
    tool = TOOLS[name]
    assert all(type_of(key) is not None for key in tool.names.values() if isinstance(key, str))
    assert not set(tool.names) & set(tool.only)


def test_every_key_of_the_installed_llama_factory_is_known():
    """Mapped, refused or irrelevant; its arguments for generation are read by its other commands."""
    spec = find_spec("llamafactory")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("LLaMA-Factory is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "hparams"
    found = set()
    for file in ("data_args", "model_args", "finetuning_args", "training_args"):
        for kind in ast.walk(ast.parse((folder / f"{file}.py").read_text(encoding="utf-8"))):
            if isinstance(kind, ast.ClassDef):
                found |= {entry.target.id for entry in kind.body if isinstance(entry, ast.AnnAssign)}
    assert len(found) > 150
    known = argument_types().keys()
    assert {key for key in found if not TOOLS["LLaMA-Factory"].knows(key) and key not in known} == set()
