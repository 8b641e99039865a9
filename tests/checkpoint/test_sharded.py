"""Two processes under each engine: a damaged shard is named and the older checkpoint ends at the same bits."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from run_cases import short_run, write_questions
from safetensors.torch import load_file

ENGINES = {
    "ddp": ([], "optimizer.pt", None),
    "zero2": (["deepspeed.enabled=true", "deepspeed.config=zero2"], "*_optim_states.pt", "DeepSpeed saved it from 2"),
    "zero2_offload": (
        ["deepspeed.enabled=true", "deepspeed.config=zero2_offload"],
        "*_optim_states.pt",
        "DeepSpeed saved it from 2",
    ),
    "zero3": (["deepspeed.enabled=true", "deepspeed.config=zero3"], "*_model_states.pt", "DeepSpeed saved it from 2"),
    "fsdp2": (["training.fsdp=full_shard", "training.fsdp_config.version=2"], "optimizer.bin", "only one"),
    "fsdp2, sharded": (
        [
            "training.fsdp=full_shard",
            "training.fsdp_config.version=2",
            "training.fsdp_config.state_dict_type=SHARDED_STATE_DICT",
        ],
        "*.distcp",
        "only one",
    ),
}
"""Engine -> overrides, a shard of its checkpoints, and what one process says of them (None: it goes on)."""


def start(processes, tiny_dir, data, output, *more):
    settings = short_run(
        tiny_dir,
        data,
        output,
        "template.max_length=160",
        "tuner.train_type=full",
        "training.packing=false",
        "training.per_device_train_batch_size=1",
        f"training.gradient_accumulation_steps={2 // processes}",
        "training.max_steps=4",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.learning_rate=1e-3",
        *more,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "qwenvl_ft.train", *settings]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, check=False)


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_shard_is_named_and_the_older_checkpoint_ends_at_the_same_bits(tiny_dir, tmp_path, engine):
    settings, shard, says = ENGINES[engine]
    data = write_questions(tmp_path, 8)
    whole, again, alone = (tmp_path / name for name in ("whole", "again", "alone"))
    done = start(2, tiny_dir, data, whole, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(whole, again)
    (alone / "checkpoint-2").parent.mkdir()
    shutil.copytree(whole / "checkpoint-2", alone / "checkpoint-2")
    damaged = sorted((again / "checkpoint-4").rglob(shard))[-1]
    os.truncate(damaged, damaged.stat().st_size // 2)
    resumed = [*settings, "training.resume_from_checkpoint=true"]
    done = start(2, tiny_dir, data, again, *resumed)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{damaged.relative_to(again / 'checkpoint-4')} has" in done.stdout
    assert f"resuming from {again / 'checkpoint-2'}" in done.stdout
    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    done = start(1, tiny_dir, data, alone, *resumed)
    if says is not None:
        assert done.returncode == 2
        assert says in done.stderr.strip().splitlines()[-1]
        return
    assert done.returncode == 0, done.stderr[-2000:]
    before, actual = (load_file(alone / name / "model.safetensors") for name in ("checkpoint-2", "."))
    for name, value in expected.items():
        moved = float((value - before[name]).abs().max())
        assert float((actual[name] - value).abs().max()) <= 1e-3 * moved + 1e-7, name
    assert any(not torch.equal(expected[name], before[name]) for name in expected), "vacuous: nothing moved"
