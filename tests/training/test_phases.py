"""Phases train the same weights as separate runs one after the other, interrupted or not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from run_cases import write_questions
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qwenvl_ft import train
from qwenvl_ft.errors import CheckpointError, DataError, RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training import phases
from qwenvl_ft.training.phases import chain

FULL = """
tuner: {train_type: full, freeze_llm: true, freeze_vit: true, freeze_aligner: false}
phases:
- name: aligner
  data: {train: %(data)s/simple.jsonl}
  training: {num_train_epochs: 2, learning_rate: 1.0e-2}
- name: top
  data: {train: %(data)s/medium.jsonl}
  tuner: {unfreeze_topk_llm: 1}
- name: all
  tuner: {freeze_llm: false}
  training: {learning_rate: 5.0e-4}
"""
LORA = """
tuner: {train_type: lora, freeze_llm: true, freeze_vit: true, freeze_aligner: false, lora_dropout: 0.1}
phases:
- name: aligner
  data: {train: %(data)s/simple.jsonl}
- name: both
  tuner: {freeze_llm: false}
"""
BASE = """
model: {model: %(model)s, torch_dtype: float32}
data: {train: %(data)s/all.jsonl}
template: {max_length: 64}
training:
  num_train_epochs: 1
  learning_rate: 1.0e-3
  gradient_accumulation_steps: 2
  dataloader_num_workers: 0
  activation_checkpointing: false
  logging_steps: 1
  save_strategy: steps
  save_steps: 1
  report_to: none
  output_dir: %(output)s
"""
KINDS = {
    "full": (FULL, ["phase_1_aligner", "phase_2_top", "phase_3_all"]),
    "lora": (LORA, ["phase_1_aligner", "phase_2_both"]),
}
COUNTS = {"1/3 simple": 1, "2/3 medium": 1, "3/3 full": 2}
"""Phase of the shipped curriculum -> samples in its test: groups of two records."""
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three files beside their images, each longer than the one before."""
    folder = tmp_path_factory.mktemp("phase_data")
    for name, count in (("simple", 6), ("medium", 8), ("all", 10)):
        write_questions(folder, count, name, answer=name, widths=(64, 80, 96, 112))
    return folder


@pytest.fixture
def write(tiny_dir, data, tmp_path):
    """``write(phases, output)`` -> a recipe's file."""

    def put(text, output):
        path = tmp_path / "curriculum.yaml"
        path.write_text((BASE + text) % {"model": tiny_dir, "data": data, "output": output})
        return path

    return put


@pytest.fixture(scope="module")
def whole(tiny_dir, data, tmp_path_factory):
    """Kind -> the folder of a run that was never stopped."""
    folders = {}
    for kind, (text, _) in KINDS.items():
        folder = tmp_path_factory.mktemp(f"whole_{kind}")
        values = {"model": tiny_dir, "data": data, "output": folder / "run"}
        (folder / "curriculum.yaml").write_text((BASE + text) % values)
        train(load_recipe(folder / "curriculum.yaml"))
        folders[kind] = folder / "run"
    return folders


def same(first, second, file):
    first, second = load_file(first / file), load_file(second / file)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.soak), "lora"])
def test_phases_train_the_same_bits_as_runs_by_hand(whole, tiny_dir, data, tmp_path, kind):
    """The same phases as separate runs, with each phase's settings and the result of the one before given by hand."""
    text, folders = KINDS[kind]
    (tmp_path / "plain.yaml").write_text(
        (BASE + text.partition("phases:")[0]) % {"model": tiny_dir, "data": data, "output": tmp_path}
    )
    by_phase = {
        "full": [
            [f"data.train={data}/simple.jsonl", "training.num_train_epochs=2", "training.learning_rate=1e-2"],
            [f"data.train={data}/medium.jsonl", "tuner.unfreeze_topk_llm=1"],
            ["tuner.freeze_llm=false", "training.learning_rate=5e-4"],
        ],
        "lora": [[f"data.train={data}/simple.jsonl"], ["tuner.freeze_llm=false"]],
    }[kind]
    before, key = None, {"full": "model.model", "lora": "tuner.resume_from_checkpoint"}[kind]
    for overrides, name in zip(by_phase, folders, strict=True):
        start = [f"{key}={before}"] if before else []
        train(load_recipe(tmp_path / "plain.yaml", [*overrides, *start, f"training.output_dir={tmp_path / name}"]))
        assert same(tmp_path / name, whole[kind] / name, WEIGHTS[kind]), name
        assert before is None or not same(before, tmp_path / name, WEIGHTS[kind]), "vacuous: the phase trains nothing"
        before = tmp_path / name
    assert same(before, whole[kind], WEIGHTS[kind]), "the last phase's model is not the run's"


def changed(first, second):
    """Return the names of the weights that differ."""
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_each_phase_trains_exactly_what_it_says(whole, tiny_dir):
    """Progressive unfreezing: the aligner, then the last layer of the language model too, then all of it."""
    folders = [tiny_dir, *(whole["full"] / name for name in KINDS["full"][1])]
    names = set(load_file(tiny_dir / "model.safetensors"))
    mergers = {name for name in names if "merger" in name}
    language = {name for name in names if "visual" not in name}
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in language if ".layers." in name)
    top = {name for name in language if f".layers.{last}." in name}
    assert len(mergers) > 4
    assert top < language
    found = [changed(*pair) for pair in pairwise(folders)]
    assert found == [mergers, mergers | top, mergers | language]


def test_the_log_tells_the_phase_of_each_line(whole):
    entries = [json.loads(line) for line in (whole["full"] / "trainer_log.jsonl").read_text().splitlines()]
    steps = [(entry["phase"], entry["step"]) for entry in entries if "loss" in entry]
    assert [phase for phase, step in steps if step == 1] == ["1/3 aligner", "2/3 top", "3/3 all"]
    assert len(steps) == len(set(steps)) > 3
    assert sum("train_loss" in entry for entry in entries) == 3
    log = (whole["full"] / "training.log").read_text()
    assert f"phase 2/3 top: starts from {whole['full'] / 'phase_1_aligner'}" in log
    assert "phase 3/3 all: step 1/" in log
    assert not list(whole["full"].glob("phase_*/training.log"))


@every_kind
def test_the_recipe_of_a_phase_runs_by_itself_and_so_does_that_of_all(whole, tmp_path, kind):
    name = KINDS[kind][1][1]
    again = load_recipe(whole[kind] / name / "recipe.yaml", [f"training.output_dir={tmp_path / 'alone'}"])
    assert not again.phases
    train(again)
    assert same(tmp_path / "alone", whole[kind] / name, WEIGHTS[kind])
    recipe = load_recipe(whole[kind] / "recipe.yaml")
    assert [run.tuner for run in chain(recipe)] == [
        load_recipe(whole[kind] / name / "recipe.yaml").tuner for name in KINDS[kind][1]
    ]


def interrupt(monkeypatch, phase, step, how):
    """Call ``how`` once, in a step of a phase."""
    from qwenvl_ft.training.trainer import QwenVLTrainer

    usual, left = QwenVLTrainer.training_step, [how]

    def training_step(self, *arguments, **more):
        if self.recipe.phase.startswith(str(phase)) and self.state.global_step == step and left:
            left.pop()()
        return usual(self, *arguments, **more)

    monkeypatch.setattr(QwenVLTrainer, "training_step", training_step)


@pytest.mark.soak
@every_kind
def test_a_run_that_breaks_in_its_second_phase_goes_on_to_the_same_bits(whole, write, tmp_path, monkeypatch, kind):
    path, output = write(KINDS[kind][0], tmp_path / "run"), tmp_path / "run"

    def broken():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupt(patch, 2, 2, broken)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(path))
    first = output / KINDS[kind][1][0]
    written = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert not (output / WEIGHTS[kind]).exists()
    with pytest.raises(CheckpointError, match=r"holds phase_1_aligner of an earlier run.*resume_from_checkpoint=true"):
        train(load_recipe(path))
    again = train(load_recipe(output / "recipe.yaml", ["training.resume_from_checkpoint=true"]))
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == written, "a finished phase ran again"
    log = (output / "training.log").read_text()
    assert "phase_1_aligner, finished before" in log
    assert f"resuming from {output / KINDS[kind][1][1] / 'checkpoint-2'}" in log
    assert all(same(output / name, whole[kind] / name, WEIGHTS[kind]) for name in KINDS[kind][1])
    assert same(output, whole[kind], WEIGHTS[kind])
    assert again.stopped_by is None
    last = train(load_recipe(output / "recipe.yaml", ["training.resume_from_checkpoint=true"]))
    assert last.steps == 0, "a finished run trained again"


def test_a_signal_ends_the_phase_and_the_run(whole, write, tmp_path, monkeypatch, capsys):
    path, output = write(FULL, tmp_path / "run"), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 2, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(load_recipe(path, ["training.save_strategy=no"]))
    assert result.stopped_by == signal.SIGTERM
    assert "phase 2/3 top: stopped by SIGTERM at step 2; to go on" in capsys.readouterr().out
    assert not (output / "phase_3_all").exists()
    assert not (output / "model.safetensors").exists()
    train(load_recipe(path, ["training.save_strategy=no", "training.resume_from_checkpoint=true"]))
    assert same(output, whole["full"], "model.safetensors")


@pytest.mark.soak
@pytest.mark.slow
def test_a_run_killed_in_its_second_phase_goes_on_to_the_same_bits(whole, write, tmp_path):
    path, output = write(LORA, tmp_path / "run"), tmp_path / "run"
    command = [sys.executable, "-m", "qwenvl_ft.train", f"recipe={path}", "training.dataloader_num_workers=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    end = time.monotonic() + 240
    while not (output / "phase_2_both" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = subprocess.run(
        [*command, "training.resume_from_checkpoint=true"], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "phase 2/2 both: resuming from" in done.stdout
    assert same(output, whole["lora"], WEIGHTS["lora"])


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same_phases(write, tiny_dir, tmp_path):
    overrides = ["training.optim=sgd", "training.learning_rate=1e-2"]
    overrides += ["training.packing=false", "training.save_strategy=no"]
    path = write(FULL, tmp_path / "one")
    train(load_recipe(path, overrides))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    overrides += ["training.gradient_accumulation_steps=1", f"training.output_dir={tmp_path / 'two'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "qwenvl_ft.train", f"recipe={path}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, start = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "one", tmp_path / "two", tiny_dir)
    )
    for name, expected in one.items():
        moved = float((expected - start[name]).abs().max())
        assert float((two[name] - expected).abs().max()) <= 1e-3 * moved + 1e-7, name
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4, "vacuous: nothing moves"


def test_of_ranks_that_find_every_phase_finished_only_the_first_writes(whole, write, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(whole["lora"], output)
    (output / "adapter_model.safetensors").unlink()
    path = write(LORA, output)
    monkeypatch.setattr(phases, "are_joined", lambda: False)  # an earlier test may have joined this process
    for rank, published in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert train(load_recipe(path, ["training.resume_from_checkpoint=true"])).steps == 0
        assert (output / "adapter_model.safetensors").exists() is published


def test_phases_may_change_the_precision(write, tmp_path):
    path = write(LORA, tmp_path / "run")
    result = train(load_recipe(path, ["phases.both.model.torch_dtype=bfloat16", "training.save_strategy=no"]))
    assert result.steps > 0
    recipe = load_recipe(tmp_path / "run" / "phase_2_both" / "recipe.yaml")
    assert recipe.model.torch_dtype == "bfloat16"
    assert load_recipe(tmp_path / "run" / "phase_1_aligner" / "recipe.yaml").model.torch_dtype == "float32"


def test_the_last_model_is_there_once_on_the_disk_and_loads(whole):
    model = AutoModelForImageTextToText.from_pretrained(whole["full"])
    assert model.config.text_config.use_cache is True
    last = whole["full"] / "phase_3_all" / "model.safetensors"
    assert (whole["full"] / "model.safetensors").samefile(last)
    assert {"config.json", "tokenizer.json", "recipe.yaml"} <= {path.name for path in whole["full"].iterdir()}


ONE = "training.resume_from_checkpoint=/a/checkpoint-1"
WRONG = {
    "data": (["phases.all.data.train=nowhere.jsonl"], DataError, "phase 3/3 all: .*nowhere.jsonl"),
    "an optimizer": (["phases.top.training.optim_args=foo=1"], RecipeError, "phase 2/3 top: training.optim_args"),
    "an option of the metric": (
        [
            "evaluation.run_after_training=true",
            "phases.all.evaluation.data=%(data)s/all.jsonl",
            "phases.aligner.evaluation.run_after_training=false",
            "phases.top.evaluation.run_after_training=false",
            "phases.all.evaluation.metric_options={ignore_cas: true}",
        ],
        RecipeError,
        "phase 3/3 all: evaluation.metric_options: 'ignore_cas' is no option",
    ),
    "a module": (["phases.all.tuner.modules_to_save=[nothing]"], RecipeError, "phase 3/3 all: .*nothing"),
    "an adapter before": (["phases.top.tuner.train_type=lora"], RecipeError, "phase 3/3 all: .*adapter of .*=lora"),
    "one checkpoint": ([ONE], RecipeError, "give true, which finds the phase"),
    "weights alone": ([ONE, "training.resume_weights_only=true"], RecipeError, "with phases starts from model.model"),
    "new blocks twice": (["tuner.train_type=llamapro"], RecipeError, "phase 2/3 top: .*blocks again"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_fault_in_any_phase_is_an_error_before_the_first_begins(write, data, tmp_path, case):
    overrides, kind, match = WRONG[case]
    overrides = [override % {"data": data} for override in overrides]
    if case == "new blocks twice":
        overrides = [
            *overrides,
            "tuner.freeze_llm=false",
            "tuner.freeze_aligner=true",
            "phases.top.tuner.unfreeze_topk_llm=0",
        ]
    with pytest.raises(kind, match=match):
        train(load_recipe(write(FULL, tmp_path / "run"), overrides))
    assert not (tmp_path / "run").exists()
