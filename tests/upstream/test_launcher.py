"""upstream/launcher.py: the variables by which a process knows its launcher are set by the launchers themselves."""

import json
import os
import subprocess
import sys

import pytest

from qwenvl_ft.upstream.launcher import launched

PROGRAM = "import json, os, sys; from qwenvl_ft.upstream.launcher import launched; print(json.dumps(launched()))"
CPU = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", *CPU],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"],
    "python": [],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_process_knows_whether_it_was_launched(launcher, tmp_path):
    script = tmp_path / "ask.py"
    script.write_text(PROGRAM)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "TORCHELASTIC"))}
    command = [sys.executable, *LAUNCHERS[launcher], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == (launcher != "python")


def test_variables_of_transformers_itself_do_not_count():
    assert not launched({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"})
