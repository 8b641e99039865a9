"""A run over a stream trains what an ordinary run trains, on any number of ranks, and resumes after a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rank_cases import in_ranks
from run_cases import saves
from safetensors.torch import load_file
from stream_cases import served, stream_run, write_jsonl, write_shards, write_tar

from qwenvl_ft import train
from qwenvl_ft.checkpoint.complete import last_checkpoint
from qwenvl_ft.checkpoint.stream_position import STREAM
from qwenvl_ft.data.plan.windows import WindowDataset
from qwenvl_ft.data.sources.stream import ORDER
from qwenvl_ft.errors import CheckpointError, DataError, RecipeError
from qwenvl_ft.recipe.load import load_recipe

STEPS = 14
NO_SAVES = "training.save_strategy=no"


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Four shards of 7 to 9 records with images, 31 in all."""
    folder = tmp_path_factory.mktemp("web")
    write_shards(folder)
    return folder


def weights(output):
    return load_file(output / "adapter_model.safetensors")


def assert_equal(first, second, **tolerances):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def differ(first, second):
    return any(not torch.equal(first[name], second[name]) for name in first)


def entries(output):
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def logged(output, key):
    return [entry[key] for entry in entries(output) if key in entry]


@pytest.fixture(scope="module")
def quiet(tiny_dir, web, tmp_path_factory):
    """A run of 14 steps over 11 windows that nothing disturbs; the shards come over http."""
    output = tmp_path_factory.mktemp("quiet") / "run"
    with served(web) as server:
        train(load_recipe(None, stream_run(tiny_dir, server.url("{000..003}.tar"), output, NO_SAVES)))
    return output


# -- what is trained -----------------------------------------------------------------------------------------------


def test_one_window_a_round_trains_the_weights_of_an_ordinary_run(tiny_dir, tmp_path, monkeypatch):
    """The reference is a run without a stream on the same file: three epochs, packed, shuffled and with dropout.

    A stream may have videos later on, so each of its batches has the filler of a video, for which dropout draws too.
    Bits can be compared without it.
    """
    monkeypatch.setattr(WindowDataset, "media_kinds", ("image",))
    write_tar(tmp_path / "a.tar", range(20))
    stream, plain = tmp_path / "stream", tmp_path / "plain"
    options = stream_run(tiny_dir, tmp_path / "a.tar", stream, NO_SAVES, "data.stream_window=20")
    train(load_recipe(None, options))
    ordinary = [option for option in options if "data.stream" not in option and "output_dir" not in option]
    train(load_recipe(None, [*ordinary, f"training.output_dir={plain}"]))
    assert_equal(weights(stream), weights(plain), rtol=0, atol=0)
    for key in ("loss", "supervised_tokens", "samples_seen", "row_fill"):
        assert logged(stream, key) == logged(plain, key), key
    assert max(logged(plain, "epoch")) > 2, "vacuous: the second epoch was not reached"
    smaller = tmp_path / "smaller"
    train(load_recipe(None, [*options, f"training.output_dir={smaller}", "data.stream_window=8"]))
    assert differ(weights(smaller), weights(plain)), "vacuous: the windows do not matter"


@pytest.mark.soak
def test_shards_on_this_machine_train_the_same_as_over_http(quiet, tiny_dir, web, tmp_path):
    """Shards are named by different addresses, in the same order; three workers make the samples."""
    more = (NO_SAVES, "training.dataloader_num_workers=3")
    train(load_recipe(None, stream_run(tiny_dir, web / "*.tar", tmp_path / "run", *more)))
    assert_equal(weights(quiet), weights(tmp_path / "run"), rtol=0, atol=0)


def test_the_copies_are_gone_after_the_run(quiet):
    assert not list(quiet.parent.glob("run-cache/*/*/shards"))


def test_the_log_has_a_line_for_each_window(quiet):
    text = (quiet / "training.log").read_text()
    assert "window 1 of up to 8 records (round 1, shard 1 of 4): 8 samples" in text
    assert "window 5 of up to 8 records (round 2, shard 1 of 4): 8 samples" in text


def test_the_end_of_the_stream_ends_the_run_and_saves_the_model(tiny_dir, web, tmp_path):
    options = stream_run(tiny_dir, web / "*.tar", tmp_path, NO_SAVES, "data.stream_rounds=1", "training.max_steps=99")
    result = train(load_recipe(None, options))
    assert 0 < result.steps < 20
    assert logged(tmp_path, "samples_seen")[-1] == 31
    assert weights(tmp_path)


# -- ranks ---------------------------------------------------------------------------------------------------------


def train_rank(options):
    result = train(load_recipe(None, options))
    return result.steps


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(tiny_dir, web, tmp_path):
    """A step has as many rows; the stream ends after its second round, for both ranks at once."""
    more = (NO_SAVES, "tuner.lora_dropout=0", "data.stream_rounds=2", "training.max_steps=99")
    options = stream_run(tiny_dir, web / "*.tar", tmp_path / "one", *more)
    one = train(load_recipe(None, options))
    two = [*options, f"training.output_dir={tmp_path / 'two'}", f"data.stream_cache={tmp_path / 'two-cache'}"]
    two += ["training.gradient_accumulation_steps=1", "training.use_cpu=true", "training.ddp_backend=gloo"]
    steps = in_ranks(2, train_rank, two)
    assert steps == [one.steps, one.steps]
    assert logged(tmp_path / "two", "samples_seen")[-1] == 62
    assert logged(tmp_path / "one", "supervised_tokens") == logged(tmp_path / "two", "supervised_tokens")
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-4, atol=1e-5)


ENGINES = {
    "shared rows": ("training.sequence_parallel_size=2", "training.gradient_accumulation_steps=2"),
    "FSDP2": ("training.fsdp=full_shard", "training.fsdp_config.version=2"),
    "ZeRO-2": ("training.deepspeed=zero2",),
}
"""How two processes share a run -> its overrides; without shared rows each has a row of its own."""


@pytest.fixture(scope="module")
def alone(tiny_dir, web, tmp_path_factory):
    """The overrides of a run of two rounds without dropout, and one process's run of it."""
    output = tmp_path_factory.mktemp("alone") / "run"
    more = (NO_SAVES, "tuner.lora_dropout=0", "data.stream_rounds=2", "training.max_steps=99")
    options = stream_run(tiny_dir, web / "*.tar", output, *more)
    train(load_recipe(None, options))
    return options, output


@pytest.mark.distributed
@pytest.mark.soak
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_of_each_engine_train_the_weights_of_one(alone, tmp_path, engine):
    options, output = alone
    two = [*options, f"training.output_dir={tmp_path / 'two'}", f"data.stream_cache={tmp_path / 'two-cache'}"]
    two += ["training.gradient_accumulation_steps=1", "training.use_cpu=true", "training.ddp_backend=gloo"]
    steps = in_ranks(2, train_rank, [*two, *ENGINES[engine]])
    assert steps[0] == steps[1] == len(logged(output, "loss"))
    assert logged(output, "supervised_tokens") == logged(tmp_path / "two", "supervised_tokens")
    assert_equal(weights(output), weights(tmp_path / "two"), rtol=1e-3, atol=1e-4)
    assert max(value.abs().max() for name, value in weights(output).items() if "lora_B" in name) > 1e-2, "vacuous"


# -- going on ------------------------------------------------------------------------------------------------------


def command(tiny_dir, data, output, *more):
    return [sys.executable, "-m", "qwenvl_ft.train", *stream_run(tiny_dir, data, output, *more)]


def run(arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=env, check=False)


def wait_for_step(output, process, step):
    log, end = output / "trainer_log.jsonl", time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and any(f'"step": {k}, ' in log.read_text() for k in range(step, STEPS)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came; exit code {process.poll()}")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(quiet, tiny_dir, web, tmp_path):
    output = tmp_path / "run"
    step = random.SystemRandom().randrange(3, STEPS - 2)
    with served(web) as server:
        arguments = command(tiny_dir, server.url("{000..003}.tar"), output, *saves((), keep=3))
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_step(output, process, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = run([*arguments, "training.resume_from_checkpoint=true"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_equal(weights(quiet), weights(output), rtol=0, atol=0)
    assert logged(output, "samples_seen")[-1] == logged(quiet, "samples_seen")[-1]


@pytest.fixture(scope="module")
def saved(tiny_dir, web, tmp_path_factory):
    """A run that saves after each step."""
    output = tmp_path_factory.mktemp("saved") / "run"
    each = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=99")
    train(load_recipe(None, stream_run(tiny_dir, web / "*.tar", output, *each)))
    return output


def resume_from(saved, step, tiny_dir, data, output, *more, change=None):
    """Resume a copy of a run from a step's checkpoint; ``change`` edits the checkpoint's `STREAM`."""
    output.mkdir()
    folder = shutil.copytree(saved / f"checkpoint-{step}", output / f"checkpoint-{step}")
    if change is not None:
        (folder / "manifest.json").unlink()
        position = json.loads((folder / STREAM).read_text())
        change(position)
        (folder / STREAM).write_text(json.dumps(position))
    options = stream_run(tiny_dir, data, output, *more, "training.save_strategy=steps", "training.save_steps=99")
    return train(load_recipe(None, [*options, f"training.resume_from_checkpoint={folder}"]))


@pytest.mark.soak
@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_any_step_is_gone_on_from(saved, quiet, tiny_dir, web, tmp_path, step):
    """Steps 1 and 4 are the last of a window, 7 is amid one, 12 is in the third round."""
    resume_from(saved, step, tiny_dir, web / "*.tar", tmp_path / "run")
    assert_equal(weights(quiet), weights(tmp_path / "run"), rtol=0, atol=0)
    assert logged(tmp_path / "run", "samples_seen") == logged(quiet, "samples_seen")[step:]


def test_another_position_than_the_saved_one_is_refused(saved, tiny_dir, web, tmp_path):
    """The guard of the tests above: the window of step 7 read from another place of the stream."""

    def elsewhere(position):
        position["begin"]["position"]["record"] += 1

    with pytest.raises(CheckpointError, match="samples"):
        resume_from(saved, 7, tiny_dir, web / "*.tar", tmp_path / "refused", change=elsewhere)


def write_alike(path, numbers, letter="r"):
    """Write records of text that have the same length."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "it is so"}]
    path.write_text("".join(json.dumps({"id": f"{letter}{k % 10}", "conversations": turns}) + "\n" for k in numbers))


@pytest.fixture(scope="module")
def alike(tiny_dir, tmp_path_factory):
    """Two shards of records that all have the same length, and a run over them that saves after each step."""
    folder = tmp_path_factory.mktemp("alike")
    for number in range(2):
        write_alike(folder / f"{number}.jsonl", range(12))
    each = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=99")
    options = stream_run(tiny_dir, folder / "*.jsonl", folder / "run", *each, "training.max_steps=5")
    train(load_recipe(None, options))
    return folder


@pytest.mark.soak
def test_another_position_is_refused_where_all_windows_have_the_same_lengths(alike, tiny_dir, tmp_path):
    """The lengths alone cannot tell; the shards' bytes and the rows of the window can."""

    def elsewhere(position):
        position["begin"]["position"]["record"] -= 2

    data, more = alike / "*.jsonl", "training.max_steps=5"
    resume_from(alike / "run", 3, tiny_dir, data, tmp_path / "same", more, change=lambda position: None)
    before = json.loads((alike / "run" / "checkpoint-3" / "plan.json").read_text())
    with pytest.raises(CheckpointError, match=r"has as many records of the same lengths, but other ones"):
        resume_from(alike / "run", 3, tiny_dir, data, tmp_path / "refused", more, change=elsewhere)

    def of_an_earlier_release(position):
        elsewhere(position)
        plan = tmp_path / "old" / "checkpoint-3" / "plan.json"
        plan.write_text(json.dumps({key: value for key, value in before.items() if key != "data"}))

    resume_from(alike / "run", 3, tiny_dir, data, tmp_path / "old", more, change=of_an_earlier_release)


def test_a_shard_of_other_records_of_the_same_lengths_is_refused(alike, tiny_dir, tmp_path):
    options = stream_run(tiny_dir, alike / "*.jsonl", tmp_path / "probe", "training.max_steps=5")
    kept = {path: path.read_bytes() for path in alike.glob("*.jsonl")}
    try:
        for path in kept:
            write_alike(path, range(12), letter="s")
            assert len(path.read_bytes()) == len(kept[path])
        with pytest.raises(CheckpointError, match="Put the original shards back"):
            resume_from(alike / "run", 3, tiny_dir, alike / "*.jsonl", tmp_path / "run", *options[-1:])
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_a_finished_stream_that_is_resumed_saves_its_model(tiny_dir, web, tmp_path):
    each = ("data.stream_rounds=1", "training.max_steps=99", "training.save_strategy=steps", "training.save_steps=1")
    options = stream_run(tiny_dir, web / "*.tar", tmp_path / "run", *each)
    first = train(load_recipe(None, options))
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{first.steps}"
    again = train(load_recipe(None, [*options, f"training.resume_from_checkpoint={checkpoint}"]))
    assert again.steps == first.steps
    assert_equal(before, weights(tmp_path / "run"), rtol=0, atol=0)


def test_a_run_is_resumed_with_and_without_a_stream_only_as_it_was(saved, tiny_dir, web, tmp_path):
    with pytest.raises(CheckpointError, match=r"data\.stream_window is 9 and was 8"):
        resume_from(saved, 4, tiny_dir, web / "*.tar", tmp_path / "other", "data.stream_window=9")
    folder = saved / "checkpoint-4"
    plain = [
        option for option in stream_run(tiny_dir, web / "*.tar", tmp_path / "plain") if "data.stream" not in option
    ]
    with pytest.raises(CheckpointError, match=r"data\.streaming is false and was true"):
        train(load_recipe(None, [*plain, f"training.resume_from_checkpoint={folder}"]))


# -- faults --------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_gone_stops_the_run_at_its_window_with_a_checkpoint(quiet, tiny_dir, web, tmp_path):
    output = tmp_path / "run"
    with served(web) as server:
        options = stream_run(tiny_dir, server.url("{000..003}.tar"), output, "training.save_steps=99")
        third = np.random.default_rng([ORDER, 42, 0]).permutation(4)[2]
        server.gone = {f"{third:03d}.tar"}
        with pytest.raises(DataError, match=r"answers 404.*Step \d+ is saved in \S+ Go on with"):
            train(load_recipe(None, options))
        server.gone = set()
        train(load_recipe(None, [*options, "training.resume_from_checkpoint=true"]))
    assert_equal(weights(quiet), weights(output), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=-1", r"Set training\.max_steps"),
        ("data.train={a.tar: 1}", "has weights"),
        ("data.split_dataset_ratio=0.1", r"data\.split_dataset_ratio=0\.1 does not go with data\.streaming"),
        ("data.check_dataset_strategy=error", r"Set data\.on_error=skip"),
        ("training.save_strategy=epoch", "would save after each window"),
        ("tuner.init_weights=eva", "does not read again"),
        ("data.loss_weights={b: 2}", "is none of the data sets"),
    ],
)
def test_what_does_not_go_with_a_stream_is_one_error(tiny_dir, web, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(None, stream_run(tiny_dir, web / "000.tar", tmp_path, NO_SAVES, override)))


def test_a_key_of_a_stream_is_not_read_without_one(tiny_dir, web, tmp_path):
    plain = [option for option in stream_run(tiny_dir, web / "000.tar", tmp_path) if "data.stream" not in option]
    with pytest.raises(RecipeError, match=r"data\.stream_window=8 is not read with data\.streaming=false"):
        load_recipe(None, [*plain, "data.stream_window=8"])


def test_what_reads_everything_refuses_a_stream(tiny_dir, web, tmp_path):
    from qwenvl_ft.data.sources.mixture import load_mixture

    recipe = load_recipe(None, stream_run(tiny_dir, web / "000.tar", tmp_path, NO_SAVES))
    with pytest.raises(RecipeError, match="only training, check, stats and show read a stream"):
        load_mixture(recipe.data, 0)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-cache"))


def test_validation_is_not_streamed(tiny_dir, web, tmp_path):
    write_jsonl(tmp_path / "val.jsonl", range(100, 104))
    more = (NO_SAVES, f"data.val={tmp_path / 'val.jsonl'}", "training.eval_strategy=steps", "training.eval_steps=7")
    train(load_recipe(None, stream_run(tiny_dir, web / "*.tar", tmp_path / "run", *more)))
    assert len(logged(tmp_path / "run", "eval_loss")) == 2
