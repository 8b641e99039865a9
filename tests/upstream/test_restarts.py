"""upstream/restarts.py: ranks that torchrun has restarted meet each other, whichever of them is first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_ft.upstream import restarts

SCRIPT = Path(__file__).with_name("restarted_ranks.py")


def launched(out, **variables):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    return subprocess.run([*command, str(SCRIPT), str(out)], capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.distributed
def test_a_restarted_rank_waits_for_one_that_comes_late(tmp_path):
    done = launched(tmp_path / "sum")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "sum").read_text() == "3"


@pytest.mark.soak
@pytest.mark.distributed
def test_without_a_new_store_it_looks_for_the_process_that_was_killed(tmp_path):
    """If torch mends this, the module can go."""
    done = launched(tmp_path / "sum", NAIVE="1")
    assert done.returncode != 0
    assert "onnect" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(
    "missing", [{"WORLD_SIZE": "1"}, {restarts.SHARED: "False"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}]
)
def test_a_launcher_that_restarts_nothing_is_left_alone(monkeypatch, missing):
    launcher = {"RANK": "1", "WORLD_SIZE": "2", restarts.SHARED: "True", "TORCHELASTIC_MAX_RESTARTS": "1"}
    for name, value in (launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | missing).items():
        monkeypatch.setenv(name, value)
    restarts.meet_anew()  # there is no store at port 1
    assert os.environ["MASTER_PORT"] == "1"
