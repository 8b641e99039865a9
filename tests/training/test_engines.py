"""Two ranks train a model as one process does: every engine by every method, the same names and the same values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import picture
from launch_cases import launchers
from run_cases import short_run, write_questions
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[1] / "many_runs_cases.py"
LORA = ["tuner.train_type=lora", "tuner.lora_dropout=0", "training.learning_rate=0.3"]
METHODS = {
    "full": [
        "tuner.train_type=full",
        "tuner.freeze_vit=false",
        "tuner.freeze_aligner=false",
        "training.learning_rate=0.01",
    ],
    "attention": [*LORA, "tuner.target_modules=[q_proj,k_proj,v_proj,o_proj]"],
    "experts": [*LORA, "tuner.target_regex=^$", "tuner.target_parameters=[experts.gate_up_proj,experts.down_proj]"],
    "routers": [*LORA, "tuner.target_regex=^$", "tuner.target_parameters=[mlp.gate.weight]"],
    "delta nets": [*LORA, "tuner.target_modules=[in_proj_qkv,in_proj_z,in_proj_a,in_proj_b,out_proj]"],
}
ADAPTED = {"experts": "mlp.experts", "routers": "mlp.gate", "attention": "self_attn", "delta nets": "linear_attn"}
"""Method of LoRA -> a part of the names of all modules that it adapts."""
METHODS_OF = {
    "moe": ("full", "attention", "experts", "routers"),
    "qwen3_5": ("full", "delta nets"),
    "qwen3_5_moe": ("full", "experts"),
}
PACKED = ("qwen3_5", "qwen3_5_moe")
"""Kinds whose samples share rows; each sample of the others is a row."""
ENGINES = {
    "ddp": [],
    "fsdp2": ["training.fsdp=full_shard", "training.fsdp_config.version=2"],
    "zero2": ["deepspeed.enabled=true", "deepspeed.config=zero2"],
    "zero3": ["deepspeed.enabled=true", "deepspeed.config=zero3"],
}


def write_mixed(folder):
    """Write 16 records of text, an image or a video in turn, each longer than the one before."""
    path = write_questions(folder, 12, text_every=2)
    for i in range(4):
        frames = [folder / f"{i}_{k}.jpg" for k in range(4)]
        for k, frame in enumerate(frames):
            picture(64, 64, 10 * i + k).save(frame)
        turns = [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": f"number {i} " * (i + 1)}]
        record = {"id": f"v{i}", "video": [[str(frame) for frame in frames]], "conversations": turns}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Kind of model -> the file of its records. Of four alone, every pair has one without an image."""
    alone = write_questions(tmp_path_factory.mktemp("records_alone"), 4, text_every=2)
    mixed = write_mixed(tmp_path_factory.mktemp("records_mixed"))
    return {kind: mixed if kind in PACKED else alone for kind in METHODS_OF}


def settings(kind, checkpoints, data, folder, method, engine=None, processes=1):
    """Return the JSON list of a run's settings: two steps over all records.

    Args:
        engine: a key of `ENGINES`, or None.
    """
    common = [
        f"template.max_length={192 if kind in PACKED else 256}",
        f"training.packing={str(kind in PACKED).lower()}",
        "training.per_device_train_batch_size=1",
        f"training.gradient_accumulation_steps={4 // processes}",
        "training.max_steps=2",
        "training.optim=sgd",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.save_strategy=no",
        *ENGINES.get(engine, []),
    ]
    return json.dumps(short_run(checkpoints[kind], data[kind], folder, *common, *METHODS[method]))


def launch(processes, *runs):
    """Train the runs one after the other, in one launch."""
    words = launchers(processes)["torchrun"][:-1] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *words, str(SCRIPT), *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def trained(kind, checkpoints, data, folder, methods, engine=None):
    """Train by each method on two ranks of an engine, or in one process; return method -> the weights that are stored.

    Args:
        engine: a key of `ENGINES` for two ranks, None for one process.
    """
    processes = 1 if engine is None else 2
    launch(
        processes,
        *(settings(kind, checkpoints, data, folder / method, method, engine, processes) for method in methods),
    )
    return {method: stored(folder / method) for method in methods}


def stored(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(weights, alone, checkpoint):
    """Compare what two ranks have stored with what one process has, method by method."""
    begin = stored(checkpoint)
    for method, expected in alone.items():
        found = weights[method]
        assert found.keys() == expected.keys(), (method, sorted(found.keys() ^ expected.keys())[:4])
        if method == "full":
            assert found.keys() == begin.keys(), "not the names of the checkpoint that was trained"
        for name, value in expected.items():
            assert found[name].shape == value.shape, (method, name)
            assert float((found[name] - value).abs().max()) <= 1e-6, (method, name)
        moved = {
            name: float((value - begin[name] if method == "full" else value).abs().max())
            for name, value in expected.items()
            if method == "full" or "lora_B" in name
        }
        assert max(moved.values()) > 1e-4, f"vacuous: {method} moves nothing"
        assert all(ADAPTED.get(method, "") in name for name in moved), method


@pytest.fixture(scope="module")
def alone(checkpoints, data, tmp_path_factory):
    """Return a function of a kind: method -> what one process stores; all methods."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = trained(kind, checkpoints, data, tmp_path_factory.mktemp(kind), METHODS_OF[kind])
        return found[kind]

    return of


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", METHODS_OF)
def test_every_method_trains_the_weights_of_one_process(checkpoints, data, alone, tmp_path, kind, engine):
    found = trained(kind, checkpoints, data, tmp_path, METHODS_OF[kind], engine)
    assert_same(found, alone(kind), checkpoints[kind])


@pytest.mark.soak
@pytest.mark.slow
def test_experts_alone_train_under_zero_3(checkpoints, data, tmp_path):
    """No gradient reaches the inputs of the first layer by itself. One process shards too."""
    engines = (None, "zero3")
    launch(1, *(settings("moe", checkpoints, data, tmp_path / str(engine), "experts", engine) for engine in engines))
    expected, found = ({"experts": stored(tmp_path / str(engine))} for engine in engines)
    assert_same(found, expected, checkpoints["moe"])
