"""A signal, a broken record, a loss that is not finite or a lock that one rank meets stops all ranks alike."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import write_questions

from qwenvl_ft.checkpoint import lock as locks

SCRIPT = Path(__file__).with_name("stopping_ranks.py")


def launched(tiny_dir, folder, *cases):
    """Return case -> the answers of rank 0, which are those of rank 1; one launch for all cases."""
    for name in ("sound", "damaged"):
        (folder / name).mkdir()
        write_questions(folder / name, 8)
    picture = folder / "damaged" / "6.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    owner = vars(locks.Owner.this()) | {"token": "another"}
    (folder / "locked").mkdir()
    (folder / "locked" / locks.LOCK).write_text(json.dumps(owner))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, str(folder), str(tiny_dir), *cases],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    answers = {}
    for case in cases:
        first, second = (json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1))
        for key in ("steps", "stopped_by", "error", "message", "saved"):
            assert first.get(key) == second.get(key), case
        answers[case] = first
    return answers


@pytest.mark.slow
@pytest.mark.distributed
def test_what_one_rank_meets_stops_both_at_the_same_place(tiny_dir, tmp_path):
    answers = launched(tiny_dir, tmp_path, "signal in an evaluation", "damaged in training", "locked")
    evaluation = answers["signal in an evaluation"]
    assert (evaluation["steps"], evaluation["stopped_by"], evaluation["saved"]) == (4, signal.SIGTERM, "checkpoint-4")
    damaged = answers["damaged in training"]
    assert damaged["error"] == "DataError"
    assert "train.jsonl:7" in damaged["message"]
    assert f"is saved in {tmp_path / 'damaged-in-training' / damaged['saved']}. " in damaged["message"]
    assert f"is being written by process {os.getpid()} on" in answers["locked"]["message"]


@pytest.mark.soak
@pytest.mark.distributed
def test_every_other_place_too(tiny_dir, tmp_path):
    late = "nan after the last log line"
    answers = launched(
        tiny_dir, tmp_path, "damaged in evaluation", "nan", late, "signal in the last answers", "damaged question"
    )
    assert answers["damaged in evaluation"]["error"] == "DataError"
    assert answers["damaged in evaluation"]["saved"] == "checkpoint-2"
    for case in ("nan", late):
        assert answers[case]["error"] == "TrainingError"
        assert "step 3: the loss is nan in the row of " in answers[case]["message"]
        assert answers[case]["saved"] is None, "weights that may be spoilt are not saved"
    assert not (tmp_path / late.replace(" ", "-") / "adapter_model.safetensors").exists()
    last = answers["signal in the last answers"]
    assert (last["steps"], last["stopped_by"]) == (4, signal.SIGTERM)
    assert (tmp_path / "signal-in-the-last-answers" / "adapter_model.safetensors").exists()
    assert "train.jsonl:7" in answers["damaged question"]["message"]
    assert "The trained model is saved in " in answers["damaged question"]["message"]
