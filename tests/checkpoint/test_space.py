"""A write that fails is one line with its cause, whatever library wrote, and leaves no part behind."""

import errno
import gc
import os
import resource
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from qwenvl_ft.checkpoint.complete import missing
from qwenvl_ft.checkpoint.space import failed_write, free_bytes, require_space, shown_bytes, written_whole
from qwenvl_ft.errors import CheckpointError

WRITERS = {
    "safetensors": lambda path: save_file({"a": torch.zeros(300_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(300_000)}, path),
    "python": lambda path: path.write_bytes(bytes(1_200_000)),
}


def write(folder, writer, needed=1_200_000):
    """Write a model into a folder, whole or not at all."""
    with written_whole(folder, lambda: needed, removes=True):
        folder.mkdir(exist_ok=True)
        writer(folder / "model.safetensors")


@pytest.fixture
def small_files():
    """Files of this process may have 100 kB: the kernel refuses the rest of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_the_kernel_cuts_is_one_line_and_leaves_nothing(tmp_path, small_files, writer):
    folder = tmp_path / "checkpoint-4"
    cause = rf"{folder} could not be written: .*; .* were free, and it needs 1.14 MiB"
    with pytest.raises(CheckpointError, match=cause):
        write(folder, WRITERS[writer])
    assert not folder.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(full_disk, writer):
    folder = full_disk / "checkpoint-4"
    with pytest.raises(CheckpointError, match=r"could not be written: (the disk is full|writing failed)") as caught:
        write(folder, WRITERS[writer])
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    del caught  # torch's error holds the file open
    gc.collect()
    assert free_bytes(folder) > 1_000_000


@pytest.mark.parametrize("code", ["EDQUOT", "EROFS", "EIO", "ESTALE"])
def test_the_twins_of_a_full_disk_have_names_of_their_own(code):
    number = getattr(errno, code)
    direct = OSError(number, os.strerror(number))
    assert failed_write(direct)
    rust = RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    wrapped = ValueError("outer")
    wrapped.__cause__ = rust
    assert failed_write(wrapped) == failed_write(direct)


def test_other_errors_are_raised_as_they_are_and_a_partial_checkpoint_goes_too(tmp_path):
    folder = tmp_path / "checkpoint-4"
    with pytest.raises(ZeroDivisionError):
        write(folder, lambda path: path.touch() or 1 / 0)
    assert not folder.exists()
    assert failed_write(FileNotFoundError(errno.ENOENT, "x")) == ""


def test_a_complete_checkpoint_stays_if_its_next_save_fails_before_it_is_touched(make):
    folder = make(4)
    with pytest.raises(ZeroDivisionError), written_whole(folder, lambda: 0, removes=True):
        1 / 0  # noqa: B018
    assert missing(folder) is None


def test_the_weights_of_a_run_that_failed_are_removed_and_nothing_else(tmp_path):
    kept = {"training.log", "recipe.yaml"}
    for name in kept:
        (tmp_path / name).touch()

    def fail(path):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError):
        write(tmp_path, fail)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_space_is_asked_for_in_one_line_with_both_numbers(tmp_path):
    free = free_bytes(tmp_path / "not" / "there")
    require_space(tmp_path, free // 2, "it", "go")
    with pytest.raises(CheckpointError, match=r"/run: [\d.,]+ \w+ are free, but 2 checkpoints needs [\d.,]+ GiB. Free"):
        require_space(tmp_path / "run", free * 3, "2 checkpoints", "lower training.save_total_limit")
    assert [shown_bytes(n) for n in (900, 2048, 3 << 20, 5 << 30)] == ["900 bytes", "2 KiB", "3 MiB", "5.0 GiB"]
