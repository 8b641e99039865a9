"""A run that has to stop before its end saves what it has, and goes on to the same weights."""

import json
import os
import resource
import signal

import pytest
import torch
from run_cases import run_settings, short_run, write_questions, write_records
from safetensors.torch import load_file

from qwenvl_ft import train as train_function
from qwenvl_ft.checkpoint import lock as locks
from qwenvl_ft.checkpoint.complete import last_checkpoint, missing
from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation import generate as generating
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import main
from qwenvl_ft.training import data_gate
from qwenvl_ft.training.agreement import Agreement
from qwenvl_ft.training.callbacks import signals
from qwenvl_ft.training.callbacks.signals import SignalCallback
from qwenvl_ft.training.stopping_trainer import StoppingTrainer
from qwenvl_ft.training.trainer import QwenVLTrainer

RESUME = "training.resume_from_checkpoint=true"
BEST = ("training.save_strategy=best", "training.load_best_model_at_end=true", "training.per_device_eval_batch_size=1")
EXPLODES = ("training.learning_rate=3.0", "training.lr_scheduler_type=constant", "template.max_length=96")
"""The evaluation at step 4 is the best one."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("stopping_data"))


@pytest.fixture(scope="module")
def whole(tiny_dir, data, tmp_path_factory):
    """A run of six steps that was left alone."""
    output = tmp_path_factory.mktemp("whole")
    train_function(load_recipe(None, run_settings(tiny_dir, data, output, *BEST, *EXPLODES)))
    return output


def weights(output):
    return load_file(output / "model.safetensors")


def logged(output, key):
    entries = map(json.loads, (output / "trainer_log.jsonl").read_text().splitlines())
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_an_evaluation_saves_at_once_and_the_resumed_run_evaluates_again(
    whole, tiny_dir, data, tmp_path, monkeypatch
):
    """The evaluation that is left is the best one: without it, the resumed run would end with other weights."""
    batches = []

    def guarded(self, loader, plain=StoppingTrainer.guarded):
        for batch in plain(self, loader):
            if self.state.global_step == 4:
                batches.append(batch)
                terminate()
            yield batch

    settings = run_settings(tiny_dir, data, tmp_path, *BEST, *EXPLODES)
    with monkeypatch.context() as patch:
        patch.setattr(StoppingTrainer, "guarded", guarded)
        result = train_function(load_recipe(None, settings))
    assert (result.steps, result.stopped_by) == (4, signal.SIGTERM)
    assert len(batches) == 1, "it goes on to the second batch"
    assert missing(tmp_path / "checkpoint-4") is None
    assert not (tmp_path / "model.safetensors").exists()
    assert logged(tmp_path, "eval_loss").keys() == {2}
    result = train_function(load_recipe(None, [*settings, RESUME]))
    assert (result.steps, result.stopped_by) == (6, None)
    assert logged(tmp_path, "eval_loss") == logged(whole, "eval_loss")
    assert logged(tmp_path, "loss") == logged(whole, "loss")
    assert same(weights(tmp_path), weights(whole))
    best = min(logged(whole, "eval_loss"), key=logged(whole, "eval_loss").get)
    assert best == 4, "vacuous: the evaluation that was left is not the best one"


def test_a_signal_while_answers_are_generated_ends_within_a_batch(tiny_dir, data, tmp_path, monkeypatch, capsys):
    """At the end of a run the model is saved first."""
    tokens = []

    def call(self, ids, scores, plain=generating._Interruption.__call__, **more):
        tokens.append(ids.shape[1])
        if len(tokens) == 3:
            terminate()
        return plain(self, ids, scores, **more)

    monkeypatch.setattr(generating._Interruption, "__call__", call)
    asked = ("evaluation.run_after_training=true", "evaluation.max_new_tokens=200", "evaluation.batch_size=1")
    quiet = ("training.eval_strategy=no", "training.save_strategy=no", "training.max_steps=1")
    words = run_settings(tiny_dir, data, tmp_path, *quiet, *asked)
    words = [word for word in words if "_steps=2" not in word]
    assert main(words) == 128 + signal.SIGTERM
    assert len(tokens) == 3, "no further token is generated"
    assert (tmp_path / "model.safetensors").exists()
    assert (
        "stopped by SIGTERM before all questions were answered; the trained model is saved" in capsys.readouterr().out
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handler is gone"


def test_a_second_signal_inside_a_save_does_not_cut_it(tiny_dir, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signals, "SAME", 0.0)
    plain = QwenVLTrainer.save_model

    def save_model(self, *arguments, **options):
        if self.state.global_step == 2:
            terminate()
            terminate()
        plain(self, *arguments, **options)

    monkeypatch.setattr(QwenVLTrainer, "save_model", save_model)
    settings = run_settings(tiny_dir, data, tmp_path, "training.eval_strategy=no", "training.max_steps=4")
    result = train_function(load_recipe(None, settings))
    assert (result.steps, result.stopped_by) == (3, signal.SIGTERM)
    assert missing(tmp_path / "checkpoint-2") is None
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert "one more signal stops at once and leaves it incomplete" in capsys.readouterr().out


def test_what_further_signals_do(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = SignalCallback(Agreement(1))
    stop._note(signal.SIGINT, None)
    stop._note(signal.SIGINT, None)
    assert not ended, "a terminal and a launcher send the same signal"
    stop._at -= signals.SAME
    with stop.writing():
        stop._note(signal.SIGTERM, None)
        assert not ended
        stop._note(signal.SIGTERM, None)
        assert not ended, "within the same two seconds"
        stop._at -= signals.SAME
        stop._note(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]
    stop._note(signal.SIGINT, None)
    assert ended[1:] == [128 + signal.SIGINT]


def questions(folder):
    folder.mkdir()
    return write_questions(folder, 6)


def one_a_step(tiny_dir, data, output, *more):
    """Return the settings of a run of one epoch that takes one record a step."""
    return short_run(
        tiny_dir,
        data,
        output,
        "template.max_length=160",
        "tuner.train_type=full",
        "training.packing=false",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=1",
        "training.max_steps=6",
        "training.learning_rate=1e-3",
        "training.activation_checkpointing=false",
        "training.logging_steps=1",
        "training.save_strategy=no",
        *more,
    )


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_damaged_image_in_mid_epoch_loses_nothing_and_both_ways_out_are_accepted(tiny_dir, tmp_path, workers):
    """Left out by data.on_error=skip, and replaced by the sound file: both go on to the weights of a run that had it
    so from the start."""
    more = [f"training.dataloader_num_workers={workers}"]
    data = questions(tmp_path / "data")
    sound = (tmp_path / "data" / "4.png").read_bytes()
    train_function(load_recipe(None, one_a_step(tiny_dir, data, tmp_path / "sound", *more)))
    (tmp_path / "data" / "4.png").write_bytes(sound[:-200])
    skip = ["data.on_error=skip", "data.max_bad_fraction=0.2"]
    train_function(load_recipe(None, one_a_step(tiny_dir, data, tmp_path / "skipped", *more, *skip)))
    for name, ways in {"sound": [], "skipped": skip}.items():
        (tmp_path / "data" / "4.png").write_bytes(sound[:-200])
        output = tmp_path / f"stopped-{name}"
        with pytest.raises(DataError) as caught:
            train_function(load_recipe(None, one_a_step(tiny_dir, data, output, *more)))
        saved = last_checkpoint(output)
        message = str(caught.value)
        assert "train.jsonl:5" in message
        assert (
            f"Step {saved.name.rpartition('-')[2]} is saved in {saved}. Replace the file by one of the same" in message
        )
        assert "or set data.on_error=skip if its header can still be read; then go on with training.resume" in message
        if name == "sound":
            (tmp_path / "data" / "4.png").write_bytes(sound)
        result = train_function(load_recipe(None, one_a_step(tiny_dir, data, output, *more, *ways, RESUME)))
        assert result.steps == 6
        assert same(weights(output), weights(tmp_path / name))
    assert not same(weights(tmp_path / "sound"), weights(tmp_path / "skipped")), "vacuous: the record does nothing"


def test_a_damaged_image_of_an_evaluation_saves_the_step_first(tiny_dir, data, tmp_path):
    val = write_questions(tmp_path, 2)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-200])
    more = (f'data.val={{"a": "{data / "val.jsonl"}", "b": "{val}"}}', "training.save_strategy=no")
    with pytest.raises(DataError, match=r"train.jsonl:2.*Step 2 is saved in .*checkpoint-2\. Replace"):
        train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "run", *more)))
    assert missing(tmp_path / "run" / "checkpoint-2") is None
    assert logged(tmp_path / "run", "eval_a_loss").keys() == {2}, "vacuous: the sound set was not evaluated"
    state = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()
    assert "eval_a_loss" not in state, "the resumed run would not evaluate again"


@pytest.mark.soak
def test_an_error_of_any_other_kind_between_two_steps_saves_them(tiny_dir, data, tmp_path, monkeypatch):
    """A tracker whose server is gone, for example; within a step nothing is saved, since the step has begun."""

    def log(self, logs, *arguments, plain=QwenVLTrainer.log, **options):
        if self.state.global_step == 3 and "loss" in logs:
            raise ConnectionError("no route to host")
        plain(self, logs, *arguments, **options)

    monkeypatch.setattr(QwenVLTrainer, "log", log)
    quiet = ("training.eval_strategy=no", "training.save_strategy=no")
    with pytest.raises(ConnectionError):
        train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "a", *quiet)))
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-3"
    monkeypatch.undo()
    monkeypatch.setattr(QwenVLTrainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "b", *quiet)))
    assert last_checkpoint(tmp_path / "b") is None


def test_a_write_that_fails_in_mid_save_leaves_the_checkpoint_before_and_the_run_goes_on(
    whole, tiny_dir, data, tmp_path, monkeypatch, capsys
):
    plain, (soft, hard) = QwenVLTrainer.save_beside_optimizer, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_beside_optimizer(self, folder):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            torch.save(torch.zeros(100_000), f"{folder}/optimizer.pt")
        plain(self, folder)

    settings = run_settings(tiny_dir, data, tmp_path, *EXPLODES)
    with monkeypatch.context() as patch:
        patch.setattr(QwenVLTrainer, "save_beside_optimizer", save_beside_optimizer)
        try:
            assert main(settings) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'checkpoint-4'} could not be written: ")
    assert "were free, and it needs" in error
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    train_function(load_recipe(None, [*settings, RESUME]))
    assert logged(tmp_path, "loss") == logged(whole, "loss")


def test_two_runs_do_not_share_a_folder(tiny_dir, data, tmp_path, capsys):
    """The second one is refused before it looks at its data; also a curriculum, whose folder is locked once."""
    owner = vars(locks.Owner.this()) | {"pid": os.getppid(), "started": locks._started(os.getppid())}
    phases = tmp_path / "phases.yaml"
    phases.write_text("phases: [{name: a, training: {weight_decay: 0.1}}, {name: b, training: {weight_decay: 0.2}}]\n")
    for extra in ([], [f"recipe={phases}"]):
        output = tmp_path / f"run{len(extra)}"
        output.mkdir()
        (output / locks.LOCK).write_text(json.dumps(owner))
        quiet = ("training.eval_strategy=no", "training.save_strategy=no", "training.max_steps=1")
        assert main([*extra, *run_settings(tiny_dir, data, output, *quiet)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"output_dir={output} is being written by process {os.getppid()} on {owner['host']}, since " in error
        assert [path.name for path in output.iterdir()] == [locks.LOCK]
    (output / locks.LOCK).write_text(json.dumps(owner | {"started": "1"}))
    assert main([*extra, *run_settings(tiny_dir, data, output, *quiet)]) == 0
    out = capsys.readouterr().out
    assert f"took over {output / locks.LOCK} of process {os.getppid()}" in out
    assert "waiting for a sign of life" not in out, "its process can be seen from here"
    assert not list(output.rglob(locks.LOCK))


@pytest.mark.soak
def test_a_check_of_the_pixels_is_offered_before_a_long_run(tiny_dir, data, tmp_path, monkeypatch, capsys):
    quiet = ("training.max_steps=1", "training.eval_strategy=no", "training.save_strategy=no")
    for many, output in ((9, tmp_path / "short"), (8, tmp_path / "long")):
        monkeypatch.setattr(data_gate, "MANY", many)
        train_function(load_recipe(None, run_settings(tiny_dir, data, output, *quiet)))
        line = f"to find damaged ones, in about 1 min: qwenvl-ft check {output / 'recipe.yaml'}"
        assert (line in capsys.readouterr().out) == (many == 8)
