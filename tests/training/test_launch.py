"""Every launcher, with one process and two and with DeepSpeed, gives the same weights and losses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from launch_cases import launchers
from run_cases import short_run, write_questions
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from qwenvl_ft.train import LAUNCHED

PYTHON = sys.executable


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight records, some with an image and some without: ranks get batches of different kinds."""
    folder = tmp_path_factory.mktemp("launch_data")
    return write_questions(folder, 8, widths=(64, 96, 128), longest=4, text_every=2)


def start(launcher, processes, checkpoint, data, output, *more):
    """Run four steps over all eight samples each; without packing, so that a step is 8 samples in any split."""
    arguments = short_run(
        checkpoint,
        data,
        output,
        "template.max_length=256",
        "tuner.train_type=full",
        "tuner.freeze_vit=false",
        "tuner.freeze_aligner=false",
        "training.packing=false",
        "training.per_device_train_batch_size=1",
        f"training.gradient_accumulation_steps={8 // processes}",
        "training.max_steps=4",
        "training.learning_rate=1e-3",
        "training.optim=sgd",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.max_grad_norm=0.5",
        "training.logging_steps=1",
        "training.save_strategy=no",
        *more,
    )
    command = [PYTHON, *launchers(processes)[launcher], "qwenvl_ft.train", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    assert stored(output) == stored(checkpoint), "not stored as the checkpoint that was trained"
    entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry], served(output)


def stored(folder):
    """Return the names and shapes of the weights in a folder's files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return found


def served(folder):
    """Return the weights that plain transformers loads from a folder, by name."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").state_dict()


@pytest.fixture(scope="module")
def reference(tiny_dir, data, tmp_path_factory):
    return start("python", 1, tiny_dir, data, tmp_path_factory.mktemp("reference"))


def assert_same_run(run, reference, checkpoint, tolerance=1e-5):
    losses, weights = run
    assert losses == pytest.approx(reference[0], rel=tolerance)
    begin = served(checkpoint)
    for name, expected in reference[1].items():
        moved = float((expected - begin[name]).abs().max())
        assert float((weights[name] - expected).abs().max()) <= 1e-3 * moved + 1e-7, name
    assert max(float((reference[1][name] - begin[name]).abs().max()) for name in begin) > 1e-4, "vacuous: nothing moved"


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_one_process_by_any_launcher_is_bit_equal(tiny_dir, data, tmp_path, reference, launcher):
    losses, weights = start(launcher, 1, tiny_dir, data, tmp_path)
    assert losses == reference[0]
    assert all(torch.equal(weights[name], reference[1][name]) for name in weights)


@pytest.mark.soak
@pytest.mark.slow
def test_deepspeed_runs_in_one_process_without_a_launcher(tiny_dir, data, tmp_path, reference):
    run = start("python", 1, tiny_dir, data, tmp_path, "deepspeed.enabled=true", "deepspeed.config=zero2")
    assert_same_run(run, reference, tiny_dir)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_train_the_same_weights(tiny_dir, data, tmp_path, reference, launcher):
    assert_same_run(start(launcher, 2, tiny_dir, data, tmp_path), reference, tiny_dir)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("preset", [pytest.param("zero2", marks=pytest.mark.soak), "zero3"])
def test_two_sharded_processes_train_the_same_weights(tiny_dir, data, tmp_path, reference, preset):
    run = start("torchrun", 2, tiny_dir, data, tmp_path, "deepspeed.enabled=true", f"deepspeed.config={preset}")
    assert_same_run(run, reference, tiny_dir)


COMPILED = {
    "ddp": [],
    "zero3": ["deepspeed.enabled=true", "deepspeed.config=zero3"],
    "fsdp2": ["training.fsdp=full_shard", "training.fsdp_config.version=2"],
}


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_layers_of_two_processes_train_the_same_weights(tiny_dir, data, tmp_path, reference, way):
    compiled = ["training.torch_compile_backend=aot_eager", "training.gradient_checkpointing=true"]
    run = start("torchrun", 2, tiny_dir, data, tmp_path, *compiled, *COMPILED[way])
    assert_same_run(run, reference, tiny_dir)


@pytest.mark.parametrize(
    ("launcher", "processes"), [pytest.param("accelerate", 1, marks=pytest.mark.soak), ("torchrun", 2), ("python", 1)]
)
def test_a_users_error_is_the_last_line_or_says_that_the_launchers_traceback_follows(launcher, processes):
    command = [PYTHON, *launchers(processes)[launcher], "qwenvl_ft.train", "modle.model=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ, check=False)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("error: "))  # once, from all ranks
    assert "Did you mean 'model'?" in lines[place]
    if launcher == "python":
        assert place == len(lines) - 1
    else:
        assert lines[place + 1] == LAUNCHED
        assert "Traceback" in "".join(lines[place + 2 :]), "vacuous: the launcher has none"


LISA = ["training.lisa_activated_layers=2", "training.lisa_step_interval=2"]
GALORE = ["training.use_galore=true", "training.galore_rank=4", "training.optim=adamw_torch"]


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
def test_lisa_trains_the_same_layers_to_the_same_weights_in_two_processes(tiny_dir, data, tmp_path):
    alone = start("python", 1, tiny_dir, data, tmp_path / "one", *LISA)
    assert_same_run(start("torchrun", 2, tiny_dir, data, tmp_path / "two", *LISA), alone, tiny_dir)
    begin = served(tiny_dir)
    layers = {
        name.split("layers.")[1][0]
        for name, value in alone[1].items()
        if "language_model.layers." in name and not torch.equal(value, begin[name])
    }
    assert 2 <= len(layers) < 4, "vacuous: two draws of two of the four layers"


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
def test_galore_projects_the_mean_gradient_of_two_processes(tiny_dir, data, tmp_path):
    pytest.importorskip("galore_torch")
    alone = start("python", 1, tiny_dir, data, tmp_path / "one", *GALORE)
    losses, _ = start("torchrun", 2, tiny_dir, data, tmp_path / "two", *GALORE)
    assert losses == pytest.approx(alone[0], rel=1e-4)
    assert losses[-1] < losses[0]
