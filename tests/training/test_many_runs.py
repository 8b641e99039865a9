"""Five different recipes in one process train the bits that each trains in a process of its own; nothing stays."""

import json
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from run_cases import short_run, write_questions
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvl_ft import train
from qwenvl_ft.data.readers import READERS
from qwenvl_ft.data.sources.registry import DATASETS
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.process_state import restored_process

TIMED = re.compile(r"elapsed_seconds|eta_seconds|peak_memory_gib|\w*runtime|\w*per_second")
"""Figures that no two processes share."""
READER = """
def read(record, source, root):
    turns = [{"role": "user", "content": "<image>Loud?"}, {"role": "assistant", "content": "LOUD"}]
    return {"messages": turns, "images": [record["image"]]}
"""


def recipes(tiny_dir, data, output):
    """Return name -> settings; each of the first four changes something in its process that could reach the others."""
    train_file = data / "train.jsonl"
    whole = ("tuner.train_type=full", "training.learning_rate=1e-3")

    def settings(name, *more):
        common = ("template.max_length=200", "training.max_steps=3", "training.logging_steps=2")
        return short_run(tiny_dir, train_file, output / name, *common, *more)

    names = json.dumps({"mine": {"annotation_path": str(train_file)}})
    return {
        "boards": settings(
            "boards",
            "tuner.train_type=lora",
            "tuner.lora_dropout=0.1",
            "training.report_to=tensorboard",
            f"training.logging_dir={output / 'boards' / 'events'}",
            "training.log_level=debug",
            "training.disable_tqdm=true",
        ),
        "reader": settings(
            "reader",
            *whole,
            f"data.datasets={names}",
            "data.train=mine",
            'data.readers={"loud": "loud_reader:read"}',
            "training.full_determinism=true",
        ),
        "compiled": settings("compiled", *whole, "training.torch_compile_backend=aot_eager"),
        "half": settings("half", "model.torch_dtype=bfloat16", "tuner.train_type=longlora", "training.seed=7"),
        "last": settings(
            "last",
            *whole,
            f"data.datasets={names.replace('train.jsonl', 'other.jsonl')}",
            "data.train=mine",
            "training.report_to=tensorboard",
            "training.neftune_noise_alpha=5",
        ),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many_data")
    write_questions(folder, 8)
    write_questions(folder, 6, "other", first=8, answer="other")
    (folder / "loud_reader.py").write_text(READER)
    return folder


def start(data, *settings):
    script = Path(__file__).resolve().parents[1] / "many_runs_cases.py"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(data), *sys.path])}
    command = [sys.executable, str(script), *map(json.dumps, settings)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=data)


def finished(process):
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-3000:]


def logged(folder):
    entries = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if not TIMED.fullmatch(key)} for entry in entries]


def files_of(folder):
    """Return the files of a run; the names of TensorBoard's files hold the time and the process."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(re.sub(r"(runs/)?[^/]*(/events\.out)\.tfevents.*", r"\1\2", name) for name in found)


@pytest.mark.soak
@pytest.mark.slow
def test_recipes_in_one_process_train_the_bits_and_files_of_their_own_processes(tiny_dir, data, tmp_path):
    one, own = (recipes(tiny_dir, data, tmp_path / folder) for folder in ("one", "own"))
    together = start(data, *one.values())
    for settings in own.values():
        finished(start(data, settings))
    finished(together)
    for name in one:
        here, there = tmp_path / "one" / name, tmp_path / "own" / name
        assert logged(here) == logged(there), name
        assert files_of(here) == files_of(there), name
        (file,) = [path.name for path in there.glob("*model.safetensors")]
        weights, expected = load_file(here / file), load_file(there / file)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
    assert any("events" in name for name in files_of(tmp_path / "own" / "last")), "vacuous: no board was written"
    assert logged(tmp_path / "own" / "reader")[0]["loss"] != logged(tmp_path / "own" / "compiled")[0]["loss"]


def state():
    """Return what a run may change in its process."""
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "data sets": dict(DATASETS),
        "readers": list(READERS),
        "levels": {name: logging.getLogger(name).level for name in ("", "transformers", "qwenvl_ft", "accelerate")},
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "filters": list(warnings.filters),
        "attention": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "flex_attention")},
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "precision": torch.backends.cuda.matmul.fp32_precision,
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "recompiling": torch._dynamo.config.recompile_limit,
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "accelerate": [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)],
    }


def differences(before, after):
    return [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize("name", ["boards", "reader", "compiled"])
def test_a_run_leaves_its_process_as_it_was(tiny_dir, data, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(data))
    recipe = load_recipe(None, recipes(tiny_dir, data, tmp_path)[name])
    before = state()
    train(recipe)
    assert differences(before, state()) == []


def change_everything(monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    sys.path.append("elsewhere")
    DATASETS["theirs"] = {"annotation_path": "theirs.jsonl"}
    READERS["theirs"] = READERS.pop("messages")
    transformers.logging.set_verbosity_debug()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="theirs")
    transformers.AttentionInterface.register("sdpa", lambda *_: None)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch._dynamo.config.recompile_limit += 5
    transformers.set_seed(12345)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)._shared_state["theirs"] = 1


def test_everything_that_a_run_may_change_is_set_back_after_an_error_too(monkeypatch):
    transformers.utils.logging.enable_progress_bar()  # another test may have disabled it
    before, changed = state(), []

    def failing():
        with restored_process():
            change_everything(monkeypatch)
            changed.extend(differences(before, state()))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert changed == list(before), set(before) - set(changed)
    assert differences(before, state()) == []


def test_a_trackers_run_is_ended_unless_the_caller_began_it(monkeypatch):
    """The next run would go on in it, with steps that begin at 0 again."""
    tracker = SimpleNamespace(run=None)
    tracker.finish = lambda: setattr(tracker, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with restored_process():
        tracker.run = "begun inside"
    assert tracker.run is None
    tracker.run = "the caller's"
    with restored_process():
        pass
    assert tracker.run == "the caller's"
