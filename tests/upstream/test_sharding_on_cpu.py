"""On CPUs accelerate ignores FSDP and trains by DDP; `shard_on_cpu` makes it shard."""

import os
import subprocess
import sys

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream import processes

SCRIPT = """
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from qwenvl_ft.upstream.processes import forget_precision, shard_on_cpu

for before in (lambda: None, shard_on_cpu):
    forget_precision()
    before()
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    layer = torch.nn.Linear(4, 4)
    model, _ = accelerator.prepare(layer, torch.optim.SGD(layer.parameters()))
    print(accelerator.distributed_type.value, type(next(model.parameters())).__name__)
torch.distributed.destroy_process_group()
"""


def test_fsdp_shards_on_cpus_which_accelerate_alone_does_not():
    """If the first line changes, accelerate has learned it and `shard_on_cpu` can go."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # DeepSpeed's log
    assert lines == ["MULTI_CPU Parameter", "FSDP DTensor"]


def test_an_accelerate_without_such_a_state_refuses_fsdp_on_cpus(monkeypatch):
    monkeypatch.setattr(processes, "SHARED", "_elsewhere")
    with pytest.raises(RecipeError, match=r"training\.fsdp: accelerate .* so FSDP cannot run on CPUs"):
        processes.shard_on_cpu()
