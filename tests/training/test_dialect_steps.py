"""A command line of another tool that does not ask for packing takes as many steps, of as many samples, as there."""

import json
import re

import pytest

from qwenvl_ft.look.forecast import forecast
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.train import main

SWIFT = """--torch_dtype float32 --train_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear
    --freeze_vit true --freeze_aligner true --learning_rate 1e-4 --num_train_epochs 1 --per_device_train_batch_size 1
    --gradient_accumulation_steps 16 --warmup_ratio 0.05 --max_length 2048 --padding_free true --logging_steps 1
    --dataloader_num_workers 0 --report_to none --save_strategy no"""
QWEN = "--model_name_or_path m --dataset_use a --per_device_train_batch_size 1 --gradient_accumulation_steps 8"
MARKS = ["--tune_mm_llm True", "--data_flatten True", "--use_lora True", "--use_lora False --freeze_vision False"]
MARKS += ["--freeze_llm False", "--train_mlp True", "--train_modules q_proj", ""]


def write_short(path, count):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(count)))
    return path


def test_the_long_line_for_ms_swift_takes_steps_of_sixteen_samples(tiny_dir, tmp_path, capsys):
    data = write_short(tmp_path / "a.jsonl", 40)
    words = f"--model {tiny_dir} --jsonl {data} --output_dir {tmp_path / 'run'} {SWIFT}".split()
    assert main(words) == 0
    assert samples_after_each_step(capsys) == [16, 32, 40]
    assert main([*words, "--packing", "true", "--output_dir", str(tmp_path / "packed")]) == 0
    assert samples_after_each_step(capsys) == [40], "vacuous: the samples do not fit into one row"


def samples_after_each_step(capsys):
    return [int(number) for number in re.findall(r"^step .* samples (\d+) ", capsys.readouterr().out, re.MULTILINE)]


@pytest.mark.parametrize("mark", MARKS)
def test_train_qwen_takes_eighty_steps_for_640_samples(mark):
    words = f"{QWEN} {mark}".split()
    lengths = [23] * 640
    planned = forecast(recipe_from_argv(words), lengths, [0] * 640, lengths)
    assert (planned.steps_per_epoch, planned.fill) == (80, None)
    packed = forecast(recipe_from_argv([*words, "--packing", "true"]), lengths, [0] * 640, lengths)
    assert packed.steps_per_epoch < 80, "vacuous"
