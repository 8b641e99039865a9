"""A run killed at any moment resumes to the same weights; a signal saves a checkpoint and prints how to resume."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from run_cases import saves, short_run, write_questions
from safetensors.torch import load_file

from qwenvl_ft import train
from qwenvl_ft.checkpoint.complete import last_checkpoint, missing
from qwenvl_ft.recipe.load import load_recipe

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten records with images on disk."""
    return write_questions(tmp_path_factory.mktemp("resume_data"), 10, answer="number", widths=(64, 80, 96, 112))


def command(tiny_dir, data, output, *more):
    settings = short_run(
        tiny_dir,
        data,
        output,
        "template.max_length=160",
        "tuner.train_type=lora",
        "tuner.lora_dropout=0.1",
        "tuner.freeze_vit=false",
        "training.learning_rate=1e-2",
        "training.gradient_accumulation_steps=2",
        "training.dataloader_num_workers=1",
        f"training.max_steps={STEPS}",
        *saves(more, keep=3),
        "training.logging_steps=1",
        *more,
    )
    return [sys.executable, "-m", "qwenvl_ft.train", *settings]


def run(arguments, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=env, check=False, **options)


def wait_for_step(output, process, step):
    """Wait until the log of a running process shows a step."""
    log = output / "trainer_log.jsonl"
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and any(f'"step": {k}, ' in log.read_text() for k in range(step, STEPS)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came; exit code {process.poll()}")


@pytest.fixture(scope="module")
def uninterrupted(tiny_dir, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    done = run(command(tiny_dir, data, output))
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def weights(output):
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted, tiny_dir, data, tmp_path):
    step = random.SystemRandom().randrange(3, STEPS - 2)
    process = subprocess.Popen(command(tiny_dir, data, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path, process, step)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(command(tiny_dir, data, tmp_path, "training.resume_from_checkpoint=true"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming from" in done.stdout, f"killed at step {step}, then started afresh"
    expected, actual = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected), f"killed at step {step}"
    losses = lambda folder: {  # noqa: E731
        entry["step"]: entry["loss"]
        for entry in map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
        if "loss" in entry
    }
    assert losses(tmp_path) == losses(uninterrupted), "the records came in another order"
    checkpoint = load_file(uninterrupted / f"checkpoint-{STEPS - 2}" / "adapter_model.safetensors")
    assert not all(torch.equal(checkpoint[name], expected[name]) for name in expected), (
        "vacuous: training moves nothing"
    )


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(tiny_dir, data, tmp_path):
    arguments = command(tiny_dir, data, tmp_path, "training.save_strategy=no", "training.max_steps=2000")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, process, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err[-2000:]
    assert "add training.resume_from_checkpoint=true" in out
    assert last_checkpoint(tmp_path) is not None
    assert (last_checkpoint(tmp_path) / "recipe.yaml").exists()


@pytest.mark.soak
@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_at_the_same_bits(
    uninterrupted, tiny_dir, data, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / f"checkpoint-{STEPS}"
    os.truncate(newest / "optimizer.pt", 100)
    (tmp_path / "adapter_model.safetensors").unlink()
    done = run(command(tiny_dir, data, tmp_path, "training.resume_from_checkpoint=true"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"passed over {newest}: optimizer.pt has 100 bytes instead of" in done.stdout
    assert f"resuming from {tmp_path / f'checkpoint-{STEPS - 2}'}" in done.stdout
    expected, actual = weights(uninterrupted), weights(tmp_path)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert missing(newest) is None, "the damaged checkpoint was not written again"


METHODS = {
    "lora": ["tuner.train_type=lora", "tuner.lora_dropout=0.1", "tuner.freeze_vit=false"],
    "vera": ["tuner.train_type=vera"],
    "lisa": ["tuner.train_type=full", "training.lisa_activated_layers=1", "training.lisa_step_interval=3"],
}
"""Methods with a state of their own -> settings. For AdaLoRA see test_adalora.py, for optimizers test_optimizers.py."""


CASES = [
    ("dense", "vera"),
    ("dense", "lisa"),
    ("qwen3_5", "lora"),
    pytest.param("qwen3_5", "lisa", marks=pytest.mark.soak),
    pytest.param("qwen3_5_moe", "lora", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_method_or_family_with_a_state_of_its_own_resumes_to_the_same_bits(checkpoints, data, tmp_path, kind, method):
    settings = [
        "template.max_length=160",
        "training.learning_rate=1e-2",
        "training.max_steps=8",
        "training.save_strategy=steps",
        "training.save_steps=4",
        "training.use_cpu=true",
        *METHODS[method],
    ]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(load_recipe(None, short_run(checkpoints[kind], data, whole, *settings)))
    shutil.copytree(whole / "checkpoint-4", rest / "checkpoint-4")
    train(
        load_recipe(None, short_run(checkpoints[kind], data, rest, *settings, "training.resume_from_checkpoint=true"))
    )
    name = "model.safetensors" if (whole / "model.safetensors").exists() else "adapter_model.safetensors"
    expected, actual, half = (load_file(folder / name) for folder in (whole, rest, whole / "checkpoint-4"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert not all(torch.equal(half[key], expected[key]) for key in expected), "vacuous: training moves nothing"
