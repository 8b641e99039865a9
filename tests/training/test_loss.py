"""The head's chunked loss and its gradients equal the plain loss, whatever kind of head the model has."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import RECORDS
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training import loss as loss_module
from qwenvl_ft.training.loss import HeadLoss, loss_sum, split_labels


@pytest.fixture
def batch(encoder):
    return split_labels(QwenVLCollator()([encoder(record) for record in RECORDS[:4]]))


def plain(model, batch, smoothing=0.0, z_loss=0.0):
    """Compute the loss from all logits at once, in float32."""
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    logits = model(**inputs).logits
    logits = logits.reshape(-1, logits.shape[-1]).float()
    penalty = z_loss * logits.exp().sum(-1).log().square().sum()
    return penalty + F.cross_entropy(logits, batch["targets"], reduction="sum", label_smoothing=smoothing)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


HEADS = {
    "tied": None,
    "untied": None,
    "LoRA": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "trained copy": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
def test_chunks_give_the_plain_loss_and_gradients(monkeypatch, tiny_dir, batch, head, smoothing, z_loss):
    model = load_model(str(tiny_dir), torch_dtype="float32")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    if head == "untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    if HEADS[head] is not None:
        model = get_peft_model(model, copy.deepcopy(HEADS[head]))
    plain(model, batch, smoothing, z_loss).backward()
    expected_loss, expected = plain(model, batch, smoothing, z_loss).item(), gradients(model)
    for chunk in (batch["targets"].numel(), 7, 1):
        monkeypatch.setattr(loss_module, "HEAD_CHUNK", chunk)
        total = loss_sum(model, batch, label_smoothing=smoothing, z_loss=z_loss)
        assert total.item() == pytest.approx(expected_loss, rel=1e-6)
        total.backward()
        actual = gradients(model)
        assert actual.keys() == expected.keys()
        for name, grad in expected.items():
            assert float((actual[name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()) + 1e-9, (name, chunk)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def head_loss(head, hidden, targets):
    """Return `HeadLoss`'s loss of hidden states ``[1, K, D]``."""
    stand_in = HeadLoss(head.forward)
    stand_in.targets = targets
    return stand_in(hidden)


def test_no_tensor_of_all_logits_exists_in_either_pass(monkeypatch):
    head = nn.Linear(8, 1000, bias=False)
    hidden, targets = torch.randn(1, 64, 8, requires_grad=True), torch.randint(0, 1000, (64,))
    monkeypatch.setattr(loss_module, "HEAD_CHUNK", 16)
    found = {}
    for name in ("chunks", "plain"):
        with Largest() as largest:
            if name == "chunks":
                head_loss(head, hidden, targets).backward()
            else:
                F.cross_entropy(head(hidden)[0], targets, reduction="sum").backward()
        found[name] = largest.elements
    assert found["chunks"] == 16 * 1000
    assert found["plain"] == 64 * 1000, "vacuous: the measure misses tensors"


def test_a_plain_head_computes_nothing_twice_and_no_gradient_that_nobody_needs(monkeypatch):
    monkeypatch.setattr(loss_module, "HEAD_CHUNK", 16)
    work = {}
    for name, needed in {"all": (True, True), "frozen head": (True, False), "no gradient": (False, False)}.items():
        head = nn.Linear(8, 100, bias=False).requires_grad_(needed[1])
        hidden, targets = torch.randn(1, 40, 8, requires_grad=needed[0]), torch.randint(0, 100, (40,))
        with FlopCounterMode(display=False) as work[name]:
            loss = head_loss(head, hidden, targets)
            if any(needed):
                loss.backward()
        assert (hidden.grad is not None, head.weight.grad is not None) == needed
    once = 2 * 40 * 8 * 100
    assert [counter.get_total_flops() for counter in work.values()] == [3 * once, 2 * once, once]


@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit weights", "autocast"])
def test_in_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(monkeypatch, autocast):
    torch.manual_seed(0)
    weight, hidden, targets = torch.randn(500, 32) / 4, torch.randn(1, 800, 32), torch.randint(0, 500, (800,))
    scale = 1 / 37

    def found(dtype, form):
        head = nn.Linear(32, 500, bias=False, dtype=dtype)
        head.weight.data.copy_(weight)
        states = hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            loss = form(head, states, targets) * scale
        loss.backward()
        assert (head.weight.grad.dtype, states.grad.dtype) == (dtype, dtype)
        return [loss.detach().double(), head.weight.grad.double(), states.grad.double()]

    def plain_form(head, states, targets):
        return F.cross_entropy(head(states)[0].float(), targets, reduction="sum")

    monkeypatch.setattr(loss_module, "HEAD_CHUNK", 16)
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = found(torch.float64, lambda head, hidden, _: F.cross_entropy(head(hidden)[0], targets, reduction="sum"))
    for ours, plain, true in zip(found(dtype, head_loss), found(dtype, plain_form), exact, strict=True):
        assert (plain - true).norm() > 0
        assert (ours - true).norm() <= 1.5 * (plain - true).norm() + 1e-5 * true.norm()


def test_weights_smoothing_and_z_loss_together_are_autograds_in_float64(monkeypatch):
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 300, bias=False), torch.randn(1, 40, 16, requires_grad=True)
    targets, weights = torch.randint(0, 300, (40,)), torch.rand(40, dtype=torch.float64)
    monkeypatch.setattr(loss_module, "HEAD_CHUNK", 16)
    stand_in = HeadLoss(head.forward)
    stand_in.targets, stand_in.weights, stand_in.label_smoothing, stand_in.z_loss = targets, weights, 0.1, 0.01
    loss = stand_in(hidden)
    loss.backward()
    weight, states = (value.detach().double().requires_grad_() for value in (head.weight, hidden))
    logits = states[0] @ weight.T
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    exact = (losses + 0.01 * logits.logsumexp(-1).square()) @ weights
    exact.backward()
    for found, true in ((loss, exact), (head.weight.grad, weight.grad), (hidden.grad, states.grad)):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(losses.mean() * weights.sum(), exact, rtol=1e-3), "vacuous: the weights do not count"


def test_float16_and_adapted_heads_are_left_to_autograd(tiny_dir):
    """Float16 gradients are scaled before the backward pass, so that small ones do not underflow in it."""
    head = nn.Linear(8, 100, bias=False)
    hidden = torch.randn(4, 8)
    assert HeadLoss(head.forward)._plain_weight(hidden) is head.weight
    with torch.autocast("cpu", torch.float16):
        assert HeadLoss(head.forward)._plain_weight(hidden) is None
    assert HeadLoss(nn.Linear(8, 100).forward)._plain_weight(hidden) is None, "it has a bias"
    model = get_peft_model(load_model(str(tiny_dir), torch_dtype="float32"), copy.deepcopy(HEADS["LoRA"]))
    adapted = model.get_output_embeddings()
    assert HeadLoss(adapted.forward)._plain_weight(torch.randn(4, adapted.in_features)) is None


def test_without_targets_the_head_is_itself(tiny_dir, batch):
    """After a loss the model returns logits again, can be copied and pickled, and keeps its names."""
    model = load_model(str(tiny_dir), torch_dtype="float32")
    names = list(model.state_dict())
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    with torch.no_grad():
        before = model(**inputs).logits
        loss_sum(model, batch)
        assert torch.equal(model(**inputs).logits, before)
        broken = batch | {"targets": batch["targets"][:-1]}
        with pytest.raises(ValueError, match="do not match"):
            loss_sum(model, broken)
        assert torch.equal(model(**inputs).logits, before), "an error left the targets behind"
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, before)
    assert list(model.state_dict()) == names
