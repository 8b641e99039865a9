"""upstream/launcher.py: the variables by which a process knows its launcher are set by the launchers themselves."""

import json
import os
import subprocess
import sys

import pytest

from qwenvl_ft.upstream.launcher import is_first_to_say, launched

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


def test_of_the_ranks_of_a_node_the_first_says_what_all_have_to_say(tmp_path, monkeypatch):
    """Each start again says it again; a rank with another error says its own."""
    said = []
    for attempt, rank, text in ((0, 1, "a"), (0, 0, "a"), (0, 3, "b"), (0, 2, "a"), (1, 0, "a"), (1, 1, "a")):
        folder = tmp_path / f"attempt_{attempt}" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        said.append(is_first_to_say(text))
    assert said == [True, False, True, False, True, False]


def test_without_the_launchers_file_every_process_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for place in ("", "/dev/null", str(tmp_path / "error.json"), str(tmp_path / "no/such/folder/0/error.json")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
        assert [is_first_to_say("a"), is_first_to_say("a")] == [True, True]
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert [is_first_to_say("a"), is_first_to_say("a")] == [True, True]
