"""``qwenvl-ft monitor`` reads the log of a run and the output of nvidia-smi."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_ft.cli import monitor
from qwenvl_ft.cli.main import main

SCRIPT = Path(__file__).resolve().parents[2] / "examples/flare25/monitor_training.py"


def entry(step, **more):
    return {"step": step, "total_steps": 40, "elapsed_seconds": 60.0 * step, **more}


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with a function that writes its log."""
    (tmp_path / "training.log").write_text("first\nsecond\nthird\n")

    def write(*logged, end="\n"):
        text = "\n".join(json.dumps(one) if isinstance(one, dict) else one for one in logged)
        (tmp_path / "trainer_log.jsonl").write_text(text + end)
        return tmp_path

    write.folder = tmp_path
    return write


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(monitor.shutil, "which", lambda name: None)


def shown(capsys, *words):
    code = main(["monitor", *map(str, words)])
    output = capsys.readouterr()
    return code, output.out.splitlines(), output.err


def test_progress_loss_mean_loss_and_time_left_are_shown(run, no_gpu, capsys):
    losses = [4.0, 3.0, 2.0, 1.0]
    logged = [entry(k + 1, loss=loss, grad_norm=0.5, eta_seconds=3600 - k) for k, loss in enumerate(losses)]
    folder = run(*logged, entry(4, eval_loss=1.25))
    code, lines, _ = shown(capsys, folder)
    assert code == 0
    assert lines[0] == str(folder)
    assert lines[1] == f"[{'#' * 6}{' ' * 54}] 10.0%  step 4 of 40"
    assert lines[2] == "elapsed 0:04:00  left 0:59:57"
    assert lines[3] == "loss 1.0000  mean of the last 4: 2.5000"
    assert lines[4] == "4.000 █▆▃▁ 1.000"
    assert lines[5] == "grad_norm 0.5  eval_loss 1.25"


def test_the_moving_average_is_of_the_last_twenty(run, no_gpu, capsys):
    folder = run(*[entry(k, loss=float(k)) for k in range(1, 31)])
    assert "loss 30.0000  mean of the last 20: 20.5000" in shown(capsys, folder)[1]


def test_repeated_steps_of_a_resumed_run_count_once_and_an_incomplete_line_is_ignored(run):
    folder = run(entry(1, loss=4.0), entry(2, loss=3.0), entry(3, loss=9.0), entry(3, eval_loss=9.0))
    assert [one["step"] for one in monitor.entries(folder)] == [1, 2, 3, 3]
    folder = run(
        entry(1, loss=4.0), entry(2, loss=3.0), entry(3, loss=9.0), entry(2, loss=3.5), '{"step": 3, "lo', end=""
    )
    assert [(one["step"], one["loss"]) for one in monitor.entries(folder)] == [(1, 4.0), (2, 3.5)]


def test_a_long_history_is_drawn_by_means():
    assert monitor.history([0.0, 0.0, 1.0, 1.0], width=2) == "0.000 ▁█ 1.000"
    assert monitor.history([2.0] * 5) == "2.000 ▁▁▁▁▁ 2.000"
    drawn = monitor.history([float(k) for k in range(1000)])
    assert len(drawn.split()[1]) == monitor.WIDTH


def test_a_run_that_has_ended_or_not_begun_is_reported_as_such(run, no_gpu, capsys):
    folder = run(entry(38, loss=1.0, eta_seconds=5), entry(40, train_loss=1.5, train_runtime=3.0))
    _, lines, _ = shown(capsys, folder)
    assert lines[1:3] == [f"[{'#' * 60}] 100.0%  step 40 of 40", "elapsed 0:40:00  ended"]
    (folder / "trainer_log.jsonl").unlink()
    assert "no step is logged yet; see training.log" in shown(capsys, folder)[1]


def test_the_last_phase_is_shown_and_ends_the_run(run, no_gpu, capsys):
    first = [entry(39, loss=9.0, phase="1/2 few"), entry(40, train_loss=9.0, phase="1/2 few")]
    assert not monitor.ended(monitor.entries(run(*first)))
    second = [entry(k, loss=2.0, phase="2/2 all", eta_seconds=7) for k in (1, 2)]
    folder = run(*first, *second)
    assert [one["step"] for one in monitor.entries(folder)] == [1, 2]
    lines = shown(capsys, folder)[1]
    assert lines[1] == "phase 2/2 all"
    assert lines[4] == "loss 2.0000  mean of the last 2: 2.0000"
    assert monitor.ended(monitor.entries(run(*first, *second, entry(40, train_loss=2.0, phase="2/2 all"))))


def test_tail_prints_the_last_lines_of_the_log(run, capsys):
    assert shown(capsys, run(), "--tail", "2")[1] == ["second", "third"]


def test_it_updates_until_the_run_ends(run, no_gpu, monkeypatch):
    folder = run(entry(1, loss=4.0))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            run(entry(1, loss=4.0), entry(40, train_loss=2.0))

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    monkeypatch.setattr(monitor.sys.stdout, "isatty", lambda: True, raising=False)
    monitor.monitor(folder, None, refresh=5.0, tail=None, once=False)
    assert waited == [5.0] * 3


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "0, NVIDIA H200, 97, 81234, 143771, 61"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert monitor.gpus() == ["GPU 0 NVIDIA H200: 97% busy, 81234 of 143771 MiB, 61 C"]
    tool.write_text('#!/bin/sh\necho "no driver" >&2\nexit 9\n')
    assert monitor.gpus() == ["nvidia-smi: no driver"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one folder"),
        (["a", "--output_dir", "b"], "name one folder"),
        (["nothing"], "nothing/training.log does not exist"),
    ],
)
def test_a_folder_without_a_run_is_a_one_line_error(words, message, capsys):
    code, lines, error = shown(capsys, *words)
    assert (code, lines) == (2, [])
    assert message in error


def test_the_script_of_the_flare_guide_is_the_same(run):
    folder = run(entry(1, loss=4.0))
    command = [sys.executable, SCRIPT, "--output_dir", folder, "--refresh", "5", "--tail", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "first\nsecond\nthird\n"), done.stderr
