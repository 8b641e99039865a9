"""Features for GPUs train there, with the same losses as the plain run in bfloat16."""

import json
from importlib.util import find_spec

import pytest
import torch
from run_cases import write_questions

from qwenvl_ft import load_recipe, train
from qwenvl_ft.bench.memory import memory
from qwenvl_ft.bench.step import StepOptions, bench_step

LORA = ("tuner.train_type=lora", "tuner.lora_rank=4", "tuner.lora_dropout=0")
FULL = ("tuner.train_type=full", "tuner.freeze_vit=false", "tuner.freeze_aligner=false")
RUNS = {
    "checkpointing": (*FULL, "training.gradient_checkpointing=true"),
    "compiled": (*FULL, "training.torch_compile=true"),
    "compiled and checkpointing": (*FULL, "training.torch_compile=true", "training.gradient_checkpointing=true"),
    "liger": (*FULL, "training.use_liger_kernel=true"),
    "float16": (*FULL, "model.torch_dtype=float16"),
    "sdpa": (*FULL, "model.attn_impl=sdpa"),
    "4 bits": (*LORA, "quantization.quantization_bit=4"),
    "8 bits": (*LORA, "quantization.quantization_bit=8"),
}
"""Settings that differ from the plain run, which uses bfloat16 and packed rows."""
NEEDS = {"liger": "liger_kernel", "4 bits": "bitsandbytes", "8 bits": "bitsandbytes"}
ON_CPU = ("checkpointing", "sdpa")
TOLERANCE = {"4 bits": 0.1, "8 bits": 0.05}
"""Relative tolerance of the loss; 0.02 for all others."""
GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("gpu_runs"), 12, widths=(64, 96, 128), longest=4)


@pytest.fixture
def losses(data, tiny_dir, tmp_path):
    """Return a function that trains four steps and returns their losses."""

    def run(name, *settings):
        options = {
            "model.model": tiny_dir,
            "model.torch_dtype": "bfloat16",
            "data.train": data,
            "template.max_length": 256,
            "training.output_dir": tmp_path / name.replace(" ", "_"),
            "training.max_steps": 4,
            "training.learning_rate": 1e-3,
            "training.logging_steps": 1,
            "training.gradient_checkpointing": "false",
            "training.dataloader_num_workers": 0,
            "training.report_to": "none",
            "training.save_strategy": "steps",
            "training.save_steps": 4,
        }
        words = [f"{key}={value}" for key, value in options.items()]
        result = train(load_recipe(None, [*words, *settings]))
        state = next(result.output_dir.rglob("trainer_state.json"))
        return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]

    return run


DEVICES = [("cpu", name) for name in ON_CPU] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in RUNS]


@pytest.mark.parametrize(("device", "name"), DEVICES)
def test_a_run_has_the_losses_of_the_plain_one(losses, device, name):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    kind = LORA if name.endswith("bits") else FULL
    expected, found = losses("plain", *kind), losses(name, *RUNS[name])
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=TOLERANCE[name] if name in TOLERANCE else 0.02)
    assert expected[-1] < expected[0] - 0.05 or kind is LORA, "vacuous: nothing was learned"


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "train_type", "row"), [("2b", "lora", 4096), ("2b", "full", 4096)])
def test_computed_memory_is_what_a_step_takes(size, train_type, row):
    """Within a fifth of torch's own peak; the table in docs/performance.md uses the computation."""
    computed = memory(size, train_type, row).total
    available = torch.cuda.get_device_properties(0).total_memory / GIB
    if computed > 0.9 * available:
        pytest.skip(f"needs {computed:.0f} GiB, the GPU has {available:.0f}")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    settings = ("tuner.lora_rank=16",) if train_type == "lora" else ()
    options = StepOptions(size=size, train_type=train_type, row_length=row, steps=2, warmup=1, settings=settings)
    result, _ = bench_step(options)
    assert result.peak_memory_gib == pytest.approx(computed, rel=0.2)


@pytest.mark.gpu
def test_the_loss_never_holds_all_logits():
    """Peak memory of the head depends on the chunk, not on the row: vocabulary 151,936, 8,192 supervised tokens."""
    from qwenvl_ft.bench.parts import bench_loss

    measured = bench_loss(tokens=16_384, supervised_share=0.5, vocabulary=151_936, width=256)
    assert measured["chunked"]["gib"] < 0.25 * measured["plain"]["gib"]
    assert measured["chunked"]["loss"] == pytest.approx(measured["plain"]["loss"], rel=1e-2)
