"""docs/coming_from.md: each command of ours is taken, and does what the page says that the other tool's does."""

import re
import shlex
from pathlib import Path

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.keys import type_of
from qwenvl_ft.recipe.schema import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
TOOLS = dict(part.split("\n", 1) for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:])
KEYS = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)(?:=([^`]+))?`")
FLAGS = re.compile(r"(?<![\w-])(--[a-z]\w*(?: (?!--)[\w.]+)?)")


def command(tool):
    """The words that our command for a tool gives to the package."""
    (block,) = re.findall(r"```bash\n(.*?)```", TOOLS[tool], flags=re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "))
    return words[words.index("qwenvl_ft.train") + 1 :]


def rows(tool):
    """The table of a tool: (theirs, ours)."""
    lines = [line.strip("| ").split(" | ") for line in TOOLS[tool].splitlines() if line.startswith("| ")]
    return [tuple(cells) for cells in lines[1:] if len(cells) == 2 and not cells[0].startswith("---")]


def test_the_page_has_every_tool():
    assert list(TOOLS) == ["ms-swift", "train_qwen.py", "LLaMA-Factory", "axolotl", "TRL", "Unsloth", "2U1"]
    assert all(rows(tool) for tool in TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_our_command_is_taken(tool):
    assert recipe_from_argv(command(tool)).data.train


@pytest.mark.parametrize("tool", TOOLS)
def test_settings_of_ours_exist(tool):
    for key, _ in KEYS.findall(TOOLS[tool]):
        assert type_of(key) is not None, key


@pytest.mark.parametrize("tool", ["ms-swift", "train_qwen.py", "2U1"])
def test_flags_that_are_named_as_ours_are_taken(tool):
    ours = [flag for _, cell in rows(tool) for flag in FLAGS.findall(cell) if not flag.startswith("--num_processes")]
    assert ours
    values = {"--freeze_vit": "true", "--freeze_aligner": "true", "--vit_lr": "1e-5", "--aligner_lr": "1e-5"}
    values |= {
        "--model": "m",
        "--dataset": "b.jsonl",
        "--media_root": "m",
        "--max_pixels": "4096",
        "--min_pixels": "1024",
    }
    values |= {"--use_liger_kernel": "true"}
    for flag in ours:
        words = flag.split() if " " in flag else [flag, values[flag]] if flag in values else []
        assert words or flag.startswith("--unfreeze"), f"{flag} is not tried"
        assert recipe_from_argv(["--dataset", "a.jsonl", *words])
    if tool == "2U1":
        full = ["--tuner_type", "full", "--freeze_llm", "true", "--unfreeze_topk_llm", "2", "--unfreeze_topk_vit", "1"]
        assert recipe_from_argv(["--dataset", "a.jsonl", *full]).tuner.unfreeze_topk_llm == 2


@pytest.mark.parametrize("tool", TOOLS)
def test_flags_to_leave_out_are_refused_by_name(tool):
    for theirs, ours in rows(tool):
        for flag in FLAGS.findall(theirs) if ours.startswith("leave") and " with " not in theirs else ():
            name, *value = flag.split()
            with pytest.raises(RecipeError, match=name):
                recipe_from_argv(["--dataset", "a.jsonl", name, *(value or ["1"])])


def test_ms_swift_means_what_it_means_there():
    tuner = recipe_from_argv(["--dataset", "a.jsonl"]).tuner
    assert (tuner.train_type, tuner.lora_rank, tuner.lora_alpha, tuner.lora_dropout) == ("lora", 8, 32, 0.05)
    assert (tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner) == (False, True, True)
    recipe = recipe_from_argv(command("ms-swift"))
    assert (recipe.training.packing, recipe.training.arguments["adam_beta2"]) == (False, 0.95)
    assert recipe.template.truncation_strategy == "delete"
    assert recipe_from_argv([*command("ms-swift"), "--packing", "true"]).training.packing


def test_train_qwen_is_full_training_of_the_parts_it_names_without_packing():
    recipe = recipe_from_argv(command("train_qwen.py"))
    assert recipe.tuner.train_type == "full"
    assert (recipe.tuner.freeze_llm, recipe.tuner.freeze_vit, recipe.tuner.freeze_aligner) == (False, True, False)
    assert (recipe.training.packing, recipe.training.padding_free) == (False, True)
    assert recipe.template.max_pixels == 576 * 32 * 32


def test_commands_for_other_tools_set_what_their_page_says():
    factory, unsloth, other = (recipe_from_argv(command(tool)) for tool in ("LLaMA-Factory", "Unsloth", "2U1"))
    assert (factory.template.max_length, factory.tuner.lora_rank, factory.training.packing) == (2048, 8, False)
    assert (unsloth.tuner.lora_rank, unsloth.tuner.lora_alpha, unsloth.quantization.quantization_bit) == (16, 16, 4)
    assert (other.tuner.train_type, other.tuner.lora_rank, other.training.packing) == ("lora", 64, False)
    assert other.deepspeed.config == "zero3_offload"


def test_records_of_these_tools_are_read(tmp_path):
    from qwenvl_ft.data.conversation import Source
    from qwenvl_ft.data.readers import read_record

    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "A cat."}]
    question = {"from": "human", "value": "<image>What is it?"}
    records = {
        "ms-swift": {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
            "images": ["a.png"],
        },
        "train_qwen.py": {"image": "a.png", "conversations": [question, {"from": "gpt", "value": "A cat."}]},
        "TRL": {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
            "images": ["a.png"],
        },
        "TRL, texts": {"prompt": "What is it?", "completion": "A cat."},
    }
    for tool, record in records.items():
        messages = read_record(record, Source("page", tool), str(tmp_path)).messages
        assert [message.role for message in messages] == ["user", "assistant"], tool
