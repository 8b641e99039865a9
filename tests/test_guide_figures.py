"""The computed figures in docs/guide.md are what the package computes, and the recipes do what the guide says."""

import re
from pathlib import Path

import pytest
import yaml

from qwenvl_ft.bench.flops import PEAK_TFLOPS, Row, model_work
from qwenvl_ft.bench.memory import SETTINGS, Run, _meta_model, _prepared, memory
from qwenvl_ft.errors import BenchError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.tuning.prepare import prepare_model

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
TEXT = " ".join(GUIDE.split())
PARAMETERS = {"2B": 2.13e9, "4B": 4.44e9, "8B": 8.77e9, "30B-A3B": 31.07e9, "70B": 70e9}
GIB = 2**30
ROW = Row([512] * 16, [1024] * 16, 2048)
"""16 samples of 512 tokens, 256 of them from an image of 1,024 patches; a quarter is supervised."""


@pytest.fixture(scope="module")
def models():
    """Size and method -> the model on the meta device."""
    built = {}
    for size in ("2b", "4b", "8b"):
        for method, settings in SETTINGS.items():
            recipe = load_recipe(None, list(settings))
            built[size, method] = prepare_model(_meta_model(size, recipe.model), recipe.tuner)
    return built


@pytest.fixture(scope="module")
def flops(models):
    """Size and method -> FLOPs per token."""
    return {key: model_work(model).flops([ROW])["total"] / 8192 for key, model in models.items()}


def counted(model, *, trainable=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def test_full_training_costs_as_many_steps_of_lora_as_stated(flops):
    ratios = [flops[size, "full"] / flops[size, "lora"] for size in ("2b", "4b", "8b")]
    assert "{:.1f} (2B), {:.1f} (4B) and {:.1f} (8B) times the FLOPs".format(*ratios) in TEXT


def test_the_memory_of_lora_is_the_one_stated():
    four, eight = ([round(memory(size, "lora", row).total) for row in (4096, 8192)] for size in ("4b", "8b"))
    assert "{} GiB with rows of 4,096 tokens, {} with 8,192".format(*four) in TEXT
    assert "rows of 4,096 tokens ({} GiB); {} GiB with 8,192".format(*eight) in TEXT
    assert f"2B in full takes {memory('2b', 'full', 4096).total:.0f} GiB with rows of 4,096" in TEXT


@pytest.mark.parametrize("lengths", ["131,072", pytest.param("32,768 262,144", marks=pytest.mark.soak)])
def test_the_memory_of_long_rows_is_the_one_stated(lengths):
    text = (ROOT / "docs/long_rows.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) (full|lora) \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    rows = [row for row in rows if row[2] in lengths.split()]
    assert len(rows) == 6 * len(lengths.split())
    for size, method, length, *stated in rows:
        runs = [Run("zero3", 8, ranks_per_row) for ranks_per_row in (1, 2, 4, 8)]
        computed = [round(memory(size, method, int(length.replace(",", "")), run=run).total) for run in runs]
        assert list(map(int, stated)) == computed, (size, method, length)


def test_what_gpus_share_is_divided_between_them():
    """Activations by the GPUs of a row; the rest by all GPUs, whatever shares the rows."""
    one, four = (memory("4b", "full", 65_536, run=Run("zero3", 8, ranks)) for ranks in (1, 4))
    assert four.checkpoints == pytest.approx(one.checkpoints / 4)
    output = 2 * 65_536 // 4 * 32 * 128 * 2 / GIB  # the heads' output is kept on both sides of the exchange
    assert four.layer == pytest.approx(one.layer / 4 + output, rel=0.01)
    same = ("weights", "gradients", "optimizer", "copies", "head")
    assert all(getattr(four, name) == getattr(one, name) for name in same)
    state = 14 * sum(p.numel() for p in _prepared("4b", "full").parameters()) / 8 / GIB
    assert one.gradients + one.optimizer == pytest.approx(state)
    with pytest.raises(BenchError, match="6 GPUs cannot be divided into groups of 4"):
        Run("zero3", 6, 4)
    with pytest.raises(BenchError, match="3 GPUs cannot share a row of 4b, which has 32 attention heads"):
        memory("4b", "lora", 4096, run=Run("zero3", 3, 3))


def test_the_share_of_the_cost_of_lora_is_the_one_stated(models, flops):
    share = flops["4b", "lora"] / flops["4b", "full"]
    held = memory("4b", "lora", 8192).total / memory("4b", "full", 8192).total
    trained = counted(models["4b", "lora"], trainable=True) / counted(models["4b", "full"])
    assert f"{share:.0%} of the FLOPs, {held:.0%} of the memory, {trained:.1%} trainable" in TEXT


def test_zero_divides_sixteen_bytes_as_stated():
    """Two bytes of weights, and fourteen of gradients, master weights and both moments."""
    zero2, zero3 = 2 + 14 / 8, 16 / 8
    assert f"8 GPUs {zero2} bytes per parameter, {1 - zero2 / 16:.0%} less" in TEXT
    assert f"8 GPUs {zero3:.0f} bytes, {1 - zero3 / 16:.0%} less" in TEXT
    per_gpu = {name: [round(count * each / GIB) for each in (zero2, zero3)] for name, count in PARAMETERS.items()}
    assert f"8B takes {per_gpu['8B'][0]} GiB per GPU, 30B-A3B {per_gpu['30B-A3B'][0]} |" in TEXT
    sizes = f"8B takes {per_gpu['8B'][1]} GiB, 30B-A3B {per_gpu['30B-A3B'][1]}, a 70B model {per_gpu['70B'][1]}"
    assert sizes in TEXT
    assert f"{16 * PARAMETERS['70B'] / GIB:,.0f} GiB of CPU memory" in TEXT


def test_the_mergers_take_what_is_stated(models):
    mergers = sum(p.numel() for name, p in models["4b", "full"].named_parameters() if "merger" in name)
    assert f"mergers of 4B also add {mergers / 1e6:.0f}M parameters" in TEXT
    assert f"{counted(models['4b', 'lora'], trainable=True) / 1e6:.0f}M of LoRA" in TEXT
    assert f"{mergers * 16 / GIB:.1f} GiB with gradients and optimizer state" in TEXT


def test_the_hours_follow_from_the_flops(flops):
    shown = {key: f"{value:.1e}".replace("e+", "e") for key, value in flops.items()}
    assert f"costs {shown['4b', 'lora']} FLOPs with LoRA on 4B, {shown['4b', 'full']} with full" in TEXT
    assert f"and {shown['8b', 'full']} of 8B" in TEXT
    assert f"{PEAK_TFLOPS['H100'] * 1e12:.1e} per second".replace("e+", "e") in TEXT
    rows = re.findall(
        r"^\| (LoRA|full training) (?:on|of) (\w+), ([\d,]+) samples.*\| (\d) \| ([\d.]+) \|$", GUIDE, re.M
    )
    assert len(rows) == 3
    for method, size, samples, gpus, hours in rows:
        each = flops[size.lower(), "lora" if method == "LoRA" else "full"]
        work = int(samples.replace(",", "")) * 1024 * 3 * each
        seconds = work / (0.4 * PEAK_TFLOPS["H100"] * 1e12 * int(gpus))
        assert f"{seconds / 3600:.1f}" == hours


def test_the_recipes_with_deepspeed_are_those_that_the_guide_names():
    using = {path.stem for path in (ROOT / "recipes").glob("*.yaml") if load_recipe(str(path)).deepspeed.enabled}
    named = set(
        re.findall(r"\[(\w+)\]\(\.\./recipes", GUIDE.partition("Most guides run every")[2].partition("LoRA on")[0])
    )
    assert named <= using
    assert using - named <= {"flare25", "memory_constrained"}


def test_base_shows_the_folder_of_tensorboard():
    text = (ROOT / "recipes/base.yaml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "logging_dir" in line]
    assert "tensorboard --logdir tb/my_run" in line
    given = yaml.safe_load(line.replace("# ", "", 1))
    assert load_recipe(None, [f"training.logging_dir={given['logging_dir']}"]).training.logging_dir == "tb/my_run"
