"""MoE checkpoints of both layouts load with the values of their files, and ZeRO-3 sees experts as one process does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading_cases import edited, last_error
from moe_cases import facts_of
from safetensors.torch import load_file, save_file

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.tiny import make_tiny
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream import expert_layout

EXPERTS, HIDDEN, LAYERS = 4, 64, 2
INNER = {"oblong": 48, "square gate_up_proj": 32, "square down_proj": 64}
"""Kind of experts -> inner size of one. ``gate_up_proj`` is square if twice of it is the hidden size."""
LAYOUTS = ("module", "released")
CASES = [(kind, layout) for kind in INNER for layout in LAYOUTS]
TUNERS = {
    "all-linear": {},
    "experts by name": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "one matrix and the router": {"target_parameters": ["down_proj", "mlp.gate.weight"]},
    "an unknown name": {"target_parameters": ["mlp.experts.gate_proj"]},
    "a share of the weights": {"train_type": "full", "freeze_parameters_ratio": 0.5},
    "bottlenecks": {"train_type": "adapter"},
    "new blocks": {"train_type": "llamapro", "llamapro_num_new_blocks": 1},
}
"""Settings whose outcome depends on the shapes of parameters."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a checkpoint of each case; return case -> folder, and kind of experts -> their values in the module."""
    root = tmp_path_factory.mktemp("experts")
    folders, values = {}, {}
    for kind, inner in INNER.items():
        base = make_tiny(
            root / kind, moe=True, moe_intermediate_size=inner, num_experts=EXPERTS, num_hidden_layers=LAYERS
        )
        weights = load_file(base / "model.safetensors")
        shapes = {"gate_up_proj": (EXPERTS, 2 * inner, HIDDEN), "down_proj": (EXPERTS, HIDDEN, inner)}
        names = [name for name in weights if name.endswith(tuple(shapes))]
        draw = torch.Generator().manual_seed(7)
        values[kind] = {name: torch.randn(shapes[name.rpartition(".")[2]], generator=draw) * 0.02 for name in names}
        assert len(names) == 2 * LAYERS
        for layout in LAYOUTS:
            folder = folders[kind, layout] = root / f"{kind}, {layout}"
            shutil.copytree(base, folder)
            stored = {k: (v.mT if layout == "released" else v).contiguous() for k, v in values[kind].items()}
            save_file(weights | stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folders, values


def assert_values(weights, expected):
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
        assert value.shape[1] != value.shape[2] or not torch.equal(value, value.mT), "vacuous: a symmetric matrix"


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_one_process_loads_the_values_of_the_file(written, kind, layout):
    folders, values = written
    model = load_model(folders[kind, layout], torch_dtype="float32", attn_impl="sdpa")
    assert_values(dict(model.named_parameters()), values[kind])


def test_experts_compute_what_the_released_code_computes_from_the_released_layout(written):
    """The released models' own code multiplies rows from the left: ``(silu(x G) * (x U)) D``."""
    folder = written[0]["square gate_up_proj", "released"]
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, torch_dtype="float32", attn_impl="sdpa")
    x, expert = torch.randn(3, HIDDEN), 2
    first = "model.language_model.layers.0.mlp.experts"
    gate, up = (x @ stored[f"{first}.gate_up_proj"][expert]).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ stored[f"{first}.down_proj"][expert]
    experts = model.get_submodule(first)
    with torch.no_grad():
        found = experts(x, torch.full((3, 1), expert), torch.ones(3, 1))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_shapes_that_fit_neither_layout_and_two_layouts_in_one_checkpoint_are_one_line(written, tmp_path):
    source = written[0]["oblong", "released"]
    narrow = edited(source, tmp_path / "narrow", lambda c: c["text_config"].update(moe_intermediate_size=40))
    message = last_error(CheckpointError, lambda: load_model(narrow))
    assert "down_proj has shape (4, 48, 64), but config.json gives (4, 64, 40) or (4, 40, 64)" in message
    mixed = shutil.copytree(source, tmp_path / "mixed")
    weights = load_file(mixed / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.experts.down_proj" in name)
    save_file(weights | {name: weights[name].mT.contiguous()}, mixed / "model.safetensors", metadata={"format": "pt"})
    message = last_error(CheckpointError, lambda: load_model(mixed))
    assert "stored in 2 layouts" in message
    assert name in message


def test_transformers_own_conversions_are_back_after_a_load(written):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    def seen():
        return [
            (entry.source_patterns, [vars(step) for step in entry.operations])
            for entry in get_checkpoint_conversion_mapping("qwen3_vl_moe")
        ]

    before = seen()
    for layout in LAYOUTS:
        load_model(written[0]["oblong", layout], torch_dtype="float32", attn_impl="sdpa")
        assert seen() == before
    assert before, "vacuous: there are none"


def test_without_the_conversion_square_experts_are_refused_and_others_load(written, monkeypatch):
    folders, values = written
    gone = expert_layout.Feature(name="it", missing=lambda: "has no register_checkpoint_conversion_mapping")
    monkeypatch.setattr(expert_layout, "CONVERSION", gone)
    message = last_error(CheckpointError, lambda: load_model(folders["square down_proj", "released"]))
    assert "might be loaded transposed" in message
    model = load_model(folders["oblong", "released"], torch_dtype="float32", attn_impl="sdpa")
    assert_values(dict(model.named_parameters()), values["oblong"])


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_loads_the_same_values_and_trains_the_same_weights(written, tmp_path):
    folders, values = written
    base = folders["oblong", "released"]
    narrow = edited(base, tmp_path / "narrow", lambda c: c["text_config"].update(moe_intermediate_size=40))
    checkpoints = {f"{kind}, {layout}": str(folders[kind, layout]) for kind, layout in CASES} | {"narrow": str(narrow)}
    asked = {"checkpoints": checkpoints, "base": str(base), "tuners": TUNERS}
    seen = run_two(tmp_path, asked)
    for kind, layout in CASES:
        assert_values(seen["values"][f"{kind}, {layout}"], values[kind])
    assert "down_proj has shape (4, 48, 64), but config.json gives" in seen["refused"]["narrow"]
    assert set(seen["refused"]) == {"narrow"}
    assert "ZeRO-3 has sharded them" in seen["prepared"].pop("new blocks")
    for name, settings in ((name, TUNERS[name]) for name in seen["prepared"]):
        assert seen["prepared"][name] == alone(base, settings), name
    table, names = seen["prepared"]["all-linear"]
    assert sum(".mlp.experts." in name for name in names) == 4 * LAYERS, table
    assert "Known: mlp.experts.down_proj" in seen["prepared"]["an unknown name"]


def alone(base, settings):
    """Return what one process sees after it prepares a model, or the error's text."""
    model = load_model(base, torch_dtype="float32", attn_impl="sdpa")
    try:
        return facts_of(prepare_model(model, TunerConfig(**settings)))
    except RecipeError as error:
        return str(error)


def run_two(folder, asked):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(Path(__file__).with_name("moe_under_zero3.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", script]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), json.dumps(asked)], capture_output=True, text=True, timeout=400, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]
    return torch.load(folder / "out.pt", weights_only=True)
