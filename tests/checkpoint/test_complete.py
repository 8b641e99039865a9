"""The newest complete checkpoint is taken; every damaged file is named; nothing that a kill leaves looks complete."""

import os
import shutil
from pathlib import Path

import pytest

from qwenvl_ft.checkpoint import manifest
from qwenvl_ft.checkpoint.complete import (
    last_checkpoint,
    missing,
    remove_partial,
    resolve_resume,
    rotate,
)
from qwenvl_ft.checkpoint.manifest import MANIFEST, SAVING, begin, partial, read, remove, seal
from qwenvl_ft.checkpoint.same_run import NOT_SHARDED, require_same_engine
from qwenvl_ft.errors import CheckpointError

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "plan.json",
    "recipe.yaml",
    "trainer_state.json",
)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
    "cut": (cut, "bytes instead of"),
    "gone": (Path.unlink, "is missing"),
    "one bit": (flip, "does not hold the bytes that were saved"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_taken(make, name, damage):
    older, newer = make(2), make(4)
    assert resolve_resume(True, older.parent).folder == newer, "vacuous: the newest is never taken"
    spoil, says = DAMAGE[damage]
    spoil(newer / name)
    found = resolve_resume(True, older.parent)
    assert found.folder == older
    assert len(found.passed) == 1
    assert found.passed[0].startswith(f"passed over {newer}: {name} ")
    assert says in found.passed[0]
    with pytest.raises(CheckpointError, match=rf"{name} .*The last complete checkpoint is {older}"):
        resolve_resume(str(newer), older.parent)


@pytest.mark.parametrize("name", FILES)
def test_without_a_manifest_a_file_that_is_gone_empty_or_cut_is_found_by_its_form(make, name):
    """Checkpoints of older releases hold no hashes; recipe.yaml is one that a run can do without."""
    older, newer = make(2, sealed=False), make(4, sealed=False)
    assert resolve_resume(True, older.parent).folder == newer
    assert any("only the form of its files" in line for line in resolve_resume(True, older.parent).lines())
    whole = (newer / name).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1]):
        if name == "recipe.yaml" and content:
            continue
        (newer / name).write_bytes(content)
        assert f"{name} is cut off" in resolve_resume(True, older.parent).passed[0], content
    (newer / name).unlink()
    assert resolve_resume(True, older.parent).folder == (newer if name == "recipe.yaml" else older)


def test_the_last_complete_checkpoint_is_taken(make, tmp_path):
    whole = make(9)
    begin(whole.parent / "checkpoint-10")
    make(8)
    shutil.copy(whole / "model.safetensors", whole.parent / "checkpoint-10")
    assert last_checkpoint(whole.parent) == whole
    assert resolve_resume("auto", whole.parent) == resolve_resume(True, whole.parent)
    assert resolve_resume("last", whole.parent).folder == whole
    assert "the run ended while it was saved" in resolve_resume(True, whole.parent).passed[0]
    assert resolve_resume(None, tmp_path / "empty").folder is None
    assert resolve_resume("true", tmp_path / "empty").folder is None
    with pytest.raises(CheckpointError, match=r"holds checkpoint-9 of an earlier run.*resume_from_checkpoint=true"):
        resolve_resume(None, whole.parent)


def test_what_cannot_be_resumed_says_why(make, tmp_path):
    whole, bare = make(4), make(8, optimizer=False)
    with pytest.raises(CheckpointError, match=r"save_only_model=true"):
        resolve_resume(str(bare), tmp_path)
    with pytest.raises(CheckpointError, match=rf"no such folder\. The last complete checkpoint is {whole}"):
        resolve_resume(str(tmp_path / "nowhere"), whole.parent)
    assert missing(whole) is None
    remove(whole)
    with pytest.raises(CheckpointError, match=r"save_only_model=true.*resume_weights_only=true"):
        resolve_resume(True, bare.parent)


def test_a_run_without_a_complete_checkpoint_begins_again_and_says_so(make):
    begin(make(2))
    adapter = make(2, sealed=False) / "adapter_model.safetensors"
    adapter.write_bytes(b"")
    found = resolve_resume(True, adapter.parents[1])
    assert found.folder is None
    assert found.lines()[-1] == "no checkpoint is complete: starting from the beginning"


def test_no_moment_of_a_save_or_a_removal_leaves_a_folder_that_looks_complete(make, monkeypatch):
    """Stop the save, and then the removal, before each of its steps on the disk."""
    steps = []

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            steps.append(function)
            if len(steps) == stop_at:
                raise Killed
            return function(*arguments, **options)

        return call

    folder = make(2)
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "shard.pt").touch()
    for path, name in ((Path, "mkdir"), (Path, "touch"), (Path, "replace"), (Path, "unlink"), (Path, "write_text")):
        monkeypatch.setattr(path, name, counted(getattr(path, name)))
    for module, name in ((shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):  # the last two inside of the first
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(manifest, "_entry", counted(manifest._entry))
    reached = 0
    for stop_at in range(1, 100):
        steps.clear()
        try:
            make(2)
        except Killed:
            reached = stop_at
            if missing(folder) is None:
                assert resolve_resume(True, folder.parent).folder == folder, "a mixture of two saves"
            continue
        break
    assert reached > 10, "vacuous"
    for stop_at in range(1, 100):
        steps.clear()
        try:
            remove(folder)
        except Killed:
            assert missing(folder) is not None or stop_at == 1
            continue
        break
    assert not folder.exists()


def test_a_half_removed_checkpoint_is_removed_at_the_next_start(make):
    half, whole = make(2), make(4)
    (half / MANIFEST).rename(half / SAVING)
    (half / "optimizer.pt").unlink()
    assert partial(half)
    assert not partial(whole)
    assert remove_partial(whole.parent) == [half]
    assert not half.exists()
    assert missing(whole) is None


def test_rotation_counts_complete_checkpoints_and_keeps_the_last_that_can_be_resumed(make):
    folders = {step: make(step) for step in (2, 4, 6)}
    cut(folders[6] / "optimizer.pt")
    begin(folders[2].parent / "checkpoint-8")
    rotate(folders[2].parent, 1)
    assert not folders[2].exists()
    assert missing(folders[4]) is None, "the last complete checkpoint was removed"
    assert folders[6].exists(), "what is damaged is left for its owner to look at"
    bare = [make(step, optimizer=False) for step in (10, 12)]
    rotate(folders[2].parent, 1)
    assert missing(folders[4]) is None, "only weights are left"
    assert [folder.exists() for folder in bare] == [False, True]
    rotate(folders[2].parent, None)
    assert folders[4].exists()


def test_rotation_keeps_the_best_and_the_one_that_was_written_last(make):
    best, stale, new = make(2), make(9), make(4)
    rotate(best.parent, 2, keep=[best])
    assert [folder.exists() for folder in (best, stale, new)] == [True, False, True]


def test_files_of_an_earlier_save_are_no_part_of_the_new_one(make):
    folder = make(2)
    (folder / "rng_state_7.pth").write_bytes(b"of eight ranks")
    make(2)
    assert not (folder / "rng_state_7.pth").exists()
    assert set(read(folder)["files"]) == set(FILES)


def test_a_result_that_was_not_saved_completely_may_be_written_again(tmp_path):
    begin(tmp_path, empty=False)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert resolve_resume(True, tmp_path).folder is None
    seal(tmp_path, ("*.safetensors",))
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors already"):
        resolve_resume(True, tmp_path)


ENGINES = {
    "DeepSpeed ZeRO-3": "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "DeepSpeed": "global_step2/mp_rank_00_model_states.pt",
    "FSDP": "optimizer_0/__0_0.distcp",
    NOT_SHARDED: "optimizer.pt",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_another_engine_or_for_deepspeed_another_number_of_processes_is_one_line(tmp_path, engine):
    file = tmp_path / ENGINES[engine]
    file.parent.mkdir(exist_ok=True)
    file.touch()
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    require_same_engine(tmp_path, engine, 2)
    if engine.startswith("DeepSpeed"):
        with pytest.raises(CheckpointError, match=r"from 2 processes, and this run has 1\. Resume it with 2, or"):
            require_same_engine(tmp_path, engine, 1)
    else:
        require_same_engine(tmp_path, engine, 1)
    for other in ENGINES.keys() - {engine}:
        with pytest.raises(CheckpointError, match=f"saved with {engine}, and this run has {other}.*weights_only"):
            require_same_engine(tmp_path, other, 2)
