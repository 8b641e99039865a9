"""Liger's kernels give the same results as transformers, under Triton's interpreter; unusable ones are left out."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model import liger_kernels as kernels
from qwenvl_ft.model.liger_kernels import FusedMLP, FusedNorm, Piece, require_liger, use_liger
from qwenvl_ft.model.load import load_model

CPU = torch.device("cpu")
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    """Return the results of liger_on_cpu.py, run as a process: Triton reads TRITON_INTERPRET when it is imported."""
    folder = tmp_path_factory.mktemp("liger")
    script = Path(__file__).with_name("liger_on_cpu.py")
    words = [sys.executable, str(script), str(checkpoints["dense"]), str(checkpoints["moe"]), str(folder)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "measured.pt") | {"folder": folder}


def differs(found, expected, tolerance=2e-5):
    """Return the names of gradients that differ, and ``loss`` if it does."""
    assert found["grads"].keys() == expected["grads"].keys()
    names = [
        name
        for name, grad in expected["grads"].items()
        if (found["grads"][name] - grad).norm() > tolerance * grad.norm() + 1e-6
    ]
    return names + ["loss"] * (found["loss"] != pytest.approx(expected["loss"], rel=1e-6))


@pytest.mark.soak
@pytest.mark.slow
@needs_liger
class TestUnderTheInterpreter:
    @pytest.mark.parametrize(
        ("kind", "modules"),
        [
            (
                "full",
                {"rms_norm": 9, "swiglu": 2, "rope": 2},
            ),  # two norms a layer, two in its attention, one at the end
            ("lora", {"rms_norm": 9, "swiglu": 2, "rope": 2}),
            ("moe", {"rms_norm": 9, "rope": 2}),  # the experts are left as they are
        ],
    )
    def test_modules_give_the_plain_loss_and_gradients(self, measured, kind, modules):
        case = measured["modules"][kind]
        assert case["modules"] == modules
        assert not differs(case["fused"], case["plain"])
        assert len(case["plain"]["grads"]) > 10
        assert case["same names"]

    def test_a_kernel_that_computes_something_else_would_be_seen(self, measured):
        case = measured["modules"]["broken"]
        assert "loss" in differs(case["fused"], case["plain"])

    def test_what_has_no_place_is_named(self, measured):
        assert "swiglu: it fits no module of this model" in measured["modules"]["moe"]["said"]
        assert "rms_norm in 9 modules, swiglu in 2 modules, rope in 2" in measured["modules"]["full"]["said"]

    @pytest.mark.parametrize("head", ["tied", "untied", "frozen"])
    def test_the_loss_is_ours_with_its_gradients(self, measured, head):
        case = measured["loss"][head]
        assert case["left"] == ""
        assert len(case["calls"]) == 2, "once with gradients, once without"
        assert not differs(case["fused"], case["plain"])
        assert case["without gradients"] == pytest.approx(case["plain"]["loss"], rel=1e-6)

    @pytest.mark.parametrize("head", ["tied", "untied", "frozen", "lora on the head"])
    def test_tokens_with_weights_and_adapted_heads_keep_our_loss(self, measured, head):
        case = measured["loss"][head]
        assert not differs(case["fused, weighted"], case["plain, weighted"])
        assert differs(case["plain, weighted"], case["plain"]), "vacuous: the weights change nothing"
        assert case["calls with weights"] == 0
        if head == "lora on the head":
            assert case["left"] == "the language head is not a plain linear layer (Linear of peft.tuners.lora.layer)"
            assert case["calls"] == []
            assert not differs(case["fused"], case["plain"])

    def test_a_run_tells_what_is_fused_and_saves_what_a_plain_one_does(self, measured):
        runs = measured["run"]
        assert runs["plain"]["said"] == ""
        assert (
            "swiglu in 4 modules, fused_linear_cross_entropy; left out: rms_norm: turned off" in runs["fused"]["said"]
        )
        assert "fused_linear_cross_entropy: loss_weights give tokens weights" in runs["weighted"]["said"]
        weights = {
            name: AutoModelForImageTextToText.from_pretrained(measured["folder"] / name / "saved").state_dict()
            for name in runs
        }
        for name in ("fused", "weighted"):
            assert runs[name]["losses"] == pytest.approx(runs["plain"]["losses"], rel=1e-6)
            assert weights[name].keys() == weights["plain"].keys()
            for key, weight in weights["plain"].items():
                torch.testing.assert_close(weights[name][key], weight, rtol=0, atol=2e-6)


@needs_liger
def test_without_a_gpu_it_is_one_line():
    with pytest.raises(RecipeError, match="Triton kernels need a GPU, but this run is on cpu"):
        require_liger(CPU)


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"is not installed\. Run pip install liger-kernel"):
        require_liger(torch.device("cuda"))


@needs_liger
def test_a_kernel_that_does_not_import_is_left_out_and_named(tiny_dir, monkeypatch):
    model = load_model(str(tiny_dir), torch_dtype="float32")
    broken = kernels.PIECES | {"rms_norm": Piece("rms_norms", "LigerRMSNormFunction", kernels.fused_norm)}
    monkeypatch.setattr(kernels, "PIECES", broken)
    fused = use_liger(model, torch.device("cuda"), {"rope": False})
    assert fused.modules == {"swiglu": 4}
    assert fused.left["rms_norm"].startswith("ModuleNotFoundError: No module named 'liger_kernel.ops.rms_norms'")
    assert fused.left["rope"] == "turned off in the recipe"
    stand_ins = [type(vars(module)["forward"]) for module in model.modules() if "forward" in vars(module)]
    assert stand_ins.count(FusedMLP) == 4
    assert FusedNorm not in stand_ins
    with pytest.raises(RecipeError, match="none of Liger's kernels can be used"):
        use_liger(load_model(str(tiny_dir)), torch.device("cuda"), dict.fromkeys(kernels.PIECES, False))


@pytest.mark.gpu
@needs_liger
def test_on_a_gpu_the_loss_is_that_of_plain_modules(tiny_dir, encoder):
    """In bfloat16, as in training, loss and gradients equal the plain ones up to rounding."""
    from cases import RECORDS

    from qwenvl_ft.data.collate import QwenVLCollator
    from qwenvl_ft.training.loss import loss_sum, split_labels, use_fused_loss

    batch = split_labels(QwenVLCollator()([encoder(record) for record in RECORDS]))
    batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}
    found = {}
    for name in ("plain", "fused"):
        model = load_model(str(tiny_dir), torch_dtype="float32").cuda().train()
        if name == "fused":
            assert use_fused_loss(model, use_liger(model, torch.device("cuda")).loss) == ""
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_sum(model, batch)
        loss.backward()
        found[name] = loss.item(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found["fused"][0] == pytest.approx(found["plain"][0], rel=1e-2)
    for key, grad in found["plain"][1].items():
        assert (found["fused"][1][key] - grad).norm() < 0.1 * grad.norm() + 1e-4, key
