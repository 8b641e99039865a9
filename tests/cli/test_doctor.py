"""``qwenvl-ft doctor`` on a machine that can train, and on one that cannot."""

import re
from importlib.metadata import version
from types import SimpleNamespace

import torch

from qwenvl_ft.cli import doctor
from qwenvl_ft.cli.main import main


def test_a_machine_that_runs_the_tests_is_ready(capsys):
    code = main(["doctor"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert output.endswith("\nready to train\n")
    for name in ("torch", "transformers", "peft"):
        assert re.search(rf"^  {name} {re.escape(version(name))}$", output, flags=re.MULTILINE)
    assert f"{torch.cuda.device_count()} usable GPUs" in output
    assert re.search(r"^  flash-attn \S+ \(extra flash\)$", output, flags=re.MULTILINE)


def test_an_old_package_and_a_missing_one_are_faults(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda name: ["peft>=99", "no-such-package>=1", "torch>=2"])
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert f"fault: peft>=99 is required, but {version('peft')} is installed. Run pip install -e ." in output
    assert "fault: no-such-package>=1 is required, but it is not installed" in output
    assert output.count("fault: ") == 2


def test_little_shared_memory_a_long_tempdir_and_an_old_driver_are_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(long))
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "fault: /dev/shm has 0.06 GiB free" in output
    assert "fault: TMPDIR=" in output
    assert "fault: nvidia-smi is installed, but torch sees no GPU" in output
