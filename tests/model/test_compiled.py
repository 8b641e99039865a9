"""Compiled layers give the same loss and gradients as plain ones, in few compilations, and keep their names."""

import shutil

import pytest
import torch
from cases import RECORDS, make_trainer, one_step
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.compiled import CompiledForward, compile_layers, restore_layers
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.tuning.prepare import prepare_model


@pytest.fixture(autouse=True)
def forget():
    """Reset the compiler, so that each test counts its own compilations."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def batches(encoder):
    """Return rows that differ in length, number of samples and longest sample."""
    rows = [RECORDS[:4], RECORDS[2:5], RECORDS[:6], RECORDS[1:8], RECORDS[3:5]]
    return [split_labels(QwenVLCollator()([encoder(record) for record in row])) for row in rows]


class Seen(TrainerCallback):
    """Records during each step if layers are compiled."""

    compiled = False

    def on_step_begin(self, args, state, control, model=None, **_):
        self.compiled = isinstance(model.model.language_model.layers[0].forward, CompiledForward)


def fresh(folder, *, checkpointing=False, lora=False):
    model = load_model(str(folder), torch_dtype="float32", attn_impl="packed_sdpa").train()
    if lora:
        targets = ["q_proj", "gate_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def step(model, batch):
    loss = loss_sum(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_same(found, expected, *, tolerance=2e-5):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name


@pytest.mark.soak
def test_layers_that_an_adapter_wraps_whole_are_compiled_below_it(tiny_dir, batches):
    reft = TunerConfig(train_type="reft", freeze_vit=True, freeze_aligner=True)
    torch.manual_seed(0)
    model = prepare_model(load_model(str(tiny_dir), torch_dtype="float32", attn_impl="packed_sdpa"), reft).train()
    expected = step(model, batches[0])
    assert compile_layers(model, backend="aot_eager") == 4
    assert_same(step(model, batches[0]), expected)
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@pytest.mark.soak
def test_layers_of_other_ranks_are_all_compiled(tiny_dir, batches, monkeypatch):
    """dynamo gives up after a number of compilations of one function, and each LoRA rank needs one."""
    ranks = {f"layers\\.{layer}\\..*": layer + 1 for layer in range(4)}
    model = load_model(str(tiny_dir), torch_dtype="float32", attn_impl="packed_sdpa").train()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], rank_pattern=ranks))
    monkeypatch.setattr("qwenvl_ft.model.compiled.RECOMPILES", 2)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        compile_layers(model, backend="aot_eager")
        for batch in batches[:2]:
            step(model, batch)
        assert torch._dynamo.config.recompile_limit == 2 + 4
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 2
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # vacuous otherwise
            step(model, batches[0])


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        pytest.param("dense", False, marks=pytest.mark.soak),
        pytest.param("dense", True, marks=pytest.mark.soak),
        ("moe", True),
        ("lora", True),
    ],
)
def test_loss_and_gradients_are_those_of_plain_layers(checkpoints, batches, kind, checkpointing):
    torch.manual_seed(0)
    model = fresh(checkpoints["moe" if kind == "moe" else "dense"], checkpointing=checkpointing, lora=kind == "lora")
    names = list(model.state_dict())
    expected = [step(model, batch) for batch in batches[:2]]
    assert compile_layers(model, backend="aot_eager") == 4
    for batch, plain_step in zip(batches[:2], expected, strict=True):
        assert_same(step(model, batch), plain_step)
    assert counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_compiled_code_is_what_runs(tiny_dir, batches, checkpointing):
    """A backend that computes something else is detected."""
    seen = []

    def doubling(graph, _):
        def run(*inputs):
            seen.append(len(inputs))
            return [
                2 * out if isinstance(out, torch.Tensor) and out.is_floating_point() else out for out in graph(*inputs)
            ]

        return run

    model = fresh(tiny_dir, checkpointing=checkpointing)
    expected, gradients = step(model, batches[0])
    compile_layers(model, backend=doubling)
    found, others = step(model, batches[0])
    assert seen
    assert found != pytest.approx(expected, rel=1e-3)
    layer = "model.language_model.layers.3.mlp.down_proj.weight"
    assert not torch.allclose(others[layer], gradients[layer], rtol=1e-2)
    restore_layers(model)
    assert_same(step(model, batches[0]), (expected, gradients))


@pytest.mark.soak
def test_rows_of_other_lengths_are_not_compiled_anew(tiny_dir, batches):
    model = fresh(tiny_dir, checkpointing=True)
    compile_layers(model, backend="aot_eager")
    assert len({batch["input_ids"].shape[1] for batch in batches}) == len(batches)
    graphs = []
    for batch in batches:
        step(model, batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1], "the second row may make a number a variable, no later one"
    assert not counters["recompile_limit"]


@pytest.mark.soak
def test_a_run_compiles_while_it_trains_and_saves_what_plain_layers_would(tiny_dir, encoder, tmp_path):
    results = {}
    for name, options in {
        "plain": {},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }.items():
        arguments = {
            "learning_rate": 1e-2,
            "optim": "sgd",
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_train_batch_size": 4,
        } | options
        trainer = make_trainer(tmp_path / name, tiny_dir, encoder, **arguments)
        trainer.add_callback(seen := Seen())
        loss, grads = one_step(trainer)
        trainer.save_model(str(tmp_path / name / "saved"))
        saved = load_model(str(tmp_path / name / "saved"), torch_dtype="float32").state_dict()
        evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        results[name] = loss, grads, saved, evals
        assert seen.compiled == (name == "compiled")
        assert not any(isinstance(module.forward, CompiledForward) for module in trainer.model.modules())
        assert counters["stats"]["unique_graphs"] == 0 or name == "compiled"
    assert counters["stats"]["unique_graphs"] > 0
    assert_same(results["compiled"][:2], results["plain"][:2])
    assert results["compiled"][3] == pytest.approx(results["plain"][3], rel=1e-6)
    assert len(results["plain"][3]) == 2
    plain, compiled = results["plain"][2], results["compiled"][2]
    assert plain.keys() == compiled.keys()
    start = load_model(str(tiny_dir), torch_dtype="float32").state_dict()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=1e-6)
    assert max(float((weight - start[name]).abs().max()) for name, weight in plain.items()) > 1e-4, "nothing moved"


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same(tiny_dir, batches):
    model = fresh(tiny_dir, checkpointing=True)
    expected = [step(model, batch) for batch in batches[:3]]
    compile_layers(model)
    for batch, plain_step in zip(batches[:3], expected, strict=True):
        assert_same(step(model, batch), plain_step)
    assert counters["inductor"]["extern_calls"] > 0
