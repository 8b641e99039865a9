"""Two ranks agree on a checkpoint, share the work of hashing it, and each disk has a manifest of its own files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks saw, on one disk and on two."""
    root = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("disks", ["shared", "own"])
def test_both_ranks_take_the_same_checkpoint_if_a_file_of_one_is_damaged(ranks, disks):
    for seen in ranks:
        assert seen[disks]["taken"] == ["checkpoint-6", "checkpoint-4", "checkpoint-4"]
        sizes, contents = seen[disks]["passed"]
        assert "rng_state_1.pth has" in sizes
        assert "rng_state_1.pth does not hold the bytes that were saved" in contents


@pytest.mark.distributed
def test_on_a_shared_disk_one_manifest_lists_the_files_of_all_ranks_and_each_file_is_read_once(ranks):
    first, second = (seen["shared"] for seen in ranks)
    assert [first["leads"], second["leads"]] == [True, False]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} < set(first["files"])
    assert first["processes"] == 2
    assert sorted(first["hashed"] + second["hashed"]) == first["files"]
    assert first["hashed"], "vacuous"
    assert second["hashed"], "one rank reads everything"
    assert first["left"] == ["checkpoint-4", "checkpoint-6"], "the oldest one stays"


@pytest.mark.distributed
def test_disks_of_their_own_have_manifests_of_their_own_files(ranks):
    for number, seen in enumerate(ranks):
        own = seen["own"]
        assert own["leads"]
        assert own["hashed"]
        assert sorted(own["hashed"]) == own["files"]
        assert [name for name in own["files"] if name.startswith("rng_state_")] == [f"rng_state_{number}.pth"]
        assert own["left"] == ["checkpoint-4", "checkpoint-6"]
