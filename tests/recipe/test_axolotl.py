"""Files of axolotl mean the same here, and each of their keys is known."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipe_cases import value_of

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.keys import type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.tools import TOOLS

AXOLOTL = """
    base_model: Qwen/Qwen3-VL-4B-Instruct
    processor_type: AutoProcessor
    skip_prepare_dataset: true
    remove_unused_columns: false
    sample_packing: false
    chat_template: qwen3_vl
    datasets:
      - path: a.jsonl
        type: chat_template
        split: train
        field_messages: messages
      - path: json
        data_files: b.jsonl
    val_set_size: 0.1
    output_dir: out
    adapter: lora
    sequence_len: 2048
    pad_to_sequence_len: false
    lora_r: 32
    lora_alpha: 16
    lora_dropout: 0.05
    lora_target_modules: 'model.language_model.layers.[\\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj'
    wandb_project:
    gradient_accumulation_steps: 4
    micro_batch_size: 2
    num_epochs: 2
    optimizer: adamw_bnb_8bit
    lr_scheduler: cosine
    learning_rate: 0.0002
    bf16: auto
    tf32: false
    gradient_checkpointing: true
    gradient_checkpointing_kwargs:
      use_reentrant: false
    logging_steps: 1
    flash_attention: true
    warmup_ratio: 0.1
    evals_per_epoch: 2
    saves_per_epoch: 1
    weight_decay: 0.0
    special_tokens:
"""


def axolotl(write, old="", new=""):
    from textwrap import dedent

    text = dedent(AXOLOTL)
    assert old in text, "vacuous"
    return write("theirs.yaml", text.replace(old, new))


def test_a_file_of_axolotl_is_read_with_its_defaults(write):
    path = axolotl(write)
    recipe = recipe_from_argv(["--config", str(path)])
    expected = {
        "model.model": "Qwen/Qwen3-VL-4B-Instruct",
        "model.attn_impl": "flash_attn",
        "data.train": ["a.jsonl", "b.jsonl"],
        "data.split_dataset_ratio": 0.1,
        "template.max_length": 2048,
        "tuner.train_type": "lora",
        "tuner.lora_rank": 32,
        "tuner.freeze_vit": False,
        "training.packing": False,
        "training.optim": "adamw_bnb_8bit",
        "training.per_device_eval_batch_size": 2,
        "training.warmup_steps": 0.1,
        "training.eval_strategy": "steps",
        "training.eval_steps": 0.25,
        "training.save_steps": 0.5,
        "training.save_total_limit": 4,
    }
    assert {key: value_of(recipe, key) for key in expected} == expected
    assert recipe.tuner.target_regex.startswith("model.language_model")
    assert (recipe.origin("tuner.freeze_vit"), recipe.origin("tuner.lora_rank")) == ("axolotl", str(path))


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("adapter: lora", "adapter: qlora\nload_in_4bit: true", "quantization.quantization_bit", 4),
        ("sample_packing: false", "sample_packing: true", "training.packing", True),
        ("saves_per_epoch: 1", "", "training.save_strategy", "epoch"),
        ("evals_per_epoch: 2", "eval_steps: 50", "training.eval_strategy", "steps"),
        ("evals_per_epoch: 2", "", "training.eval_strategy", "epoch"),
        ("val_set_size: 0.1", "", "training.eval_strategy", "no"),
        (
            "sequence_len: 2048",
            "sequence_len: 2048\nexcess_length_strategy: raise",
            "template.truncation_strategy",
            "raise",
        ),
        ("tf32: false", "freeze_mm_modules: true", "tuner.freeze_aligner", True),
    ],
)
def test_a_key_of_axolotl_sets_ours(old, new, key, value, write):
    assert value_of(load_recipe(axolotl(write, old, new)), key) == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tf32: false", "rl: dpo", r"rl: 'dpo' cannot be honoured: this package only trains on answers"),
        ("tf32: false", "tf33: false", r"tf33: axolotl has no such key"),
        ("tf32: false", "context_parallel_size: 2", r"training\.sequence_parallel_size"),
        ("tf32: false", "lisa_n_layers: 2", r"lisa_n_layers: 2 cannot be honoured"),
        ("type: chat_template", "type: alpaca", r"datasets: type: 'alpaca' is not read"),
        ("adapter: lora", "adapter: llama-adapter", r"adapter: 'llama-adapter' is not mapped"),
    ],
)
def test_what_axolotl_has_and_we_have_not_is_one_line(old, new, message, write):
    with pytest.raises(RecipeError, match=message):
        load_recipe(axolotl(write, old, new))


def test_every_key_of_the_installed_axolotl_is_known():
    spec = find_spec("axolotl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("axolotl is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "utils" / "schemas"
    kinds = {}
    for file in folder.glob("*.py"):
        for kind in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(kind, ast.ClassDef):
                kinds[kind.name] = kind

    def keys(name):
        kind = kinds.get(name)
        if kind is None:
            return set()
        own = {entry.target.id for entry in kind.body if isinstance(entry, ast.AnnAssign)}
        return own.union(*(keys(base.id) for base in kind.bases if isinstance(base, ast.Name)))

    found = keys("AxolotlInputConfig")
    assert len(found) > 300
    missing = {key for key in found if not TOOLS["axolotl"].knows(key) and type_of(f"training.{key}") is None}
    assert missing <= {"deepspeed", "evaluation_strategy", "group_by_length", "warmup_ratio"}, "these are aliases"
