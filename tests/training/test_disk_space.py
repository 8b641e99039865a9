"""Space on the disk is asked for before it is needed, and a full disk does not cost the run."""

import errno
import os
from types import SimpleNamespace

import pytest
from run_cases import run_settings, write_records
from torch import nn
from transformers import TrainingArguments

from qwenvl_ft.checkpoint import space
from qwenvl_ft.checkpoint.same_run import ENGINES, NOT_SHARDED
from qwenvl_ft.train import main
from qwenvl_ft.training.checkpoint_size import checkpoint_bytes, weight_bytes
from qwenvl_ft.training.stopping_trainer import StoppingTrainer


def test_space_is_asked_for_before_the_first_step_and_before_each_save(tiny_dir, tmp_path, monkeypatch, capsys):
    data, estimated = write_records(tmp_path), {}
    settings = run_settings(tiny_dir, data, tmp_path / "run", "training.eval_strategy=no", "training.max_steps=4")

    def free(folder):
        return 10**12 if "room" in estimated else 10_000_000

    monkeypatch.setattr(space, "free_bytes", free)
    assert main(settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "run: 9.54 MiB are free, but the trained model with 2 checkpoints (training.save_total_limit=2) needs" in error
    )
    assert not (tmp_path / "run" / "trainer_log.jsonl").exists(), "a step was trained"

    def save_now_full(self, plain=StoppingTrainer._require_space):
        estimated["bytes"] = checkpoint_bytes(self.model, self.args, adapter=False, sharded=False)
        if self.state.global_step == 4:
            estimated.pop("room")
        plain(self)

    estimated["room"] = True
    monkeypatch.setattr(StoppingTrainer, "_require_space", save_now_full)
    assert main(settings) == 2
    assert "9.54 MiB are free, but checkpoint-4 needs" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    folder = tmp_path / "run" / "checkpoint-2"
    names = ("model.safetensors", "optimizer.pt")
    real = sum((folder / name).stat().st_size for name in names)
    assert 0.97 * real < estimated["bytes"] <= real


def test_a_full_disk_costs_the_lines_of_the_log_and_not_the_run(tmp_path, capsys):
    from qwenvl_ft.training.callbacks.run_log import LOG, RunLog

    log = RunLog()
    log.folder = tmp_path
    (tmp_path / LOG).mkdir()  # cannot be opened for writing, for root neither
    log.write("a")
    log.write("b")
    assert (
        capsys.readouterr().out == f"a\n{tmp_path / LOG} cannot be written: {os.strerror(errno.EISDIR)}; "
        "training goes on\nb\n"
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_model_is_stored_twice_also_if_accelerates_file_shards_it(tmp_path, engine):
    """Then neither args.fsdp nor args.deepspeed says so."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not args.fsdp, "vacuous"
    assert args.deepspeed is None, "vacuous"
    run = SimpleNamespace(model=nn.Linear(8, 8), args=args, _saved_bytes=0, _is_adapter=lambda: False)
    whole, sharded = (
        StoppingTrainer._checkpoint_bytes(SimpleNamespace(**vars(run), engine=name)) for name in (NOT_SHARDED, engine)
    )
    assert sharded - whole == weight_bytes(run.model, adapter=False) > 0
