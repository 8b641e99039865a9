"""Only one run writes into a folder: a living owner is refused, a dead one is replaced, of several only one wins."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwenvl_ft.checkpoint import lock as locks
from qwenvl_ft.checkpoint.lock import LOCK, Owner, only_run_in, require_own
from qwenvl_ft.errors import CheckpointError

HOLDS = """
import sys, time
from pathlib import Path
from qwenvl_ft.checkpoint.lock import only_run_in
from qwenvl_ft.errors import CheckpointError
try:
    with only_run_in(Path(sys.argv[1]), lambda line: None):
        print("locked", flush=True)
        sys.stdin.readline()
except CheckpointError as error:
    print("refused", flush=True)
"""


def holder(folder):
    """Start a process that locks a folder, or is refused, and waits for a line."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def write_lock(folder, **changes):
    """Lock a folder in the name of this process's parent, which is alive, with changes."""
    folder.mkdir(exist_ok=True)
    entry = vars(Owner.this()) | {"pid": os.getppid(), "started": locks._started(os.getppid())} | changes
    (folder / LOCK).write_text(json.dumps(entry))


def test_a_living_run_is_refused_and_a_killed_one_replaced(tmp_path):
    process, lines = holder(tmp_path / "run"), []
    assert process.stdout.readline() == "locked\n"
    since = json.loads((tmp_path / "run" / LOCK).read_text())["since"]
    with (
        pytest.raises(CheckpointError, match=rf"run is being written by process {process.pid} on \S+, since {since}"),
        only_run_in(tmp_path / "run", lines.append),
    ):
        pass
    assert not lines
    process.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # dead, but not yet asked for: its number is still taken
    with only_run_in(tmp_path / "run", lines.append):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    process.wait()
    assert len(lines) == 1
    assert f"of process {process.pid} on" in lines[0]
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    write_lock(tmp_path / "reused", started="1")
    with only_run_in(tmp_path / "reused", lambda line: None):
        pass
    write_lock(tmp_path / "alive")
    with pytest.raises(CheckpointError, match=f"process {os.getppid()} "), only_run_in(tmp_path / "alive"):
        pass


def test_a_run_on_another_machine_counts_as_dead_once_it_renews_its_lock_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "EXPIRES", 1.0)
    lines = []
    write_lock(tmp_path, host="node7", machine="another boot", pid=1)
    begin = time.monotonic()
    with only_run_in(tmp_path, lines.append):
        assert time.monotonic() - begin > 0.5, "vacuous: it did not wait"
    assert "process 1 on node7" in lines[0]
    assert "waiting for a sign of life" in lines[0]
    assert "took over" in lines[1]

    write_lock(tmp_path, host="node7", machine="another boot", pid=1)
    ended = threading.Event()
    renews = threading.Thread(target=lambda: [os.utime(tmp_path / LOCK) for _ in iter(lambda: ended.wait(0.2), True)])
    renews.start()
    refused = pytest.raises(CheckpointError, match=r"process 1 on node7.*If it is surely dead, remove .*run.lock")
    with refused, only_run_in(tmp_path, lines.append):
        pass
    ended.set()
    renews.join()


def test_the_owner_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.05)
    with only_run_in(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        time.sleep(0.5)
        assert (tmp_path / LOCK).stat().st_mtime > 1000


def test_of_several_that_take_over_at_once_one_wins(tmp_path):
    write_lock(tmp_path, started="1")
    processes = [holder(tmp_path) for _ in range(4)]
    answers = sorted(process.stdout.readline() for process in processes)
    for process in processes:
        process.communicate("\n")
    assert answers == ["locked\n", "refused\n", "refused\n", "refused\n"]


def test_a_run_that_lost_its_lock_writes_no_more(tmp_path):
    with only_run_in(tmp_path):
        require_own(tmp_path / "phase_1")
        write_lock(tmp_path)
        with pytest.raises(CheckpointError, match=f"was taken over by process {os.getppid()} "):
            require_own(tmp_path / "phase_1")
    assert (tmp_path / LOCK).exists(), "the lock of another run stays"


def test_folders_that_were_made_for_the_lock_go_with_it_and_those_within_need_none(tmp_path):
    with only_run_in(tmp_path / "a" / "b"):
        with only_run_in(tmp_path / "a" / "b" / "phase_1"):
            assert not (tmp_path / "a" / "b" / "phase_1").exists()
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with only_run_in(tmp_path / "a"):
        (tmp_path / "a" / "model").touch()
    assert [path.name for path in Path(tmp_path / "a").iterdir()] == ["model"]


def test_a_run_that_cannot_write_its_lock_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(CheckpointError, match=r"run.lock cannot be written: Not a directory")
    with refused, only_run_in(tmp_path / "file" / "run"):
        pass
