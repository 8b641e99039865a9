"""The head's loss in chunks is the plain loss, with its gradients, whatever stands in the head's place."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import RECORDS
from peft import LoraConfig, get_peft_model
from torch import nn

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training import loss as loss_module
from qwenvl_ft.training.loss import HeadLoss, loss_sum, split_labels


@pytest.fixture
def batch(encoder):
    return split_labels(QwenVLCollator()([encoder(record) for record in RECORDS[:4]]))


def plain(model, batch, smoothing=0.0, z_loss=0.0):
    """All logits at once, in float32."""
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
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_of_all_logits_exists_in_either_pass(monkeypatch):
    head = nn.Linear(8, 1000, bias=False)
    hidden, targets = torch.randn(1, 64, 8, requires_grad=True), torch.randint(0, 1000, (64,))
    monkeypatch.setattr(loss_module, "HEAD_CHUNK", 16)
    found = {}
    for name in ("chunks", "plain"):
        with Largest() as largest:
            if name == "chunks":
                stand_in = HeadLoss(head.forward)
                stand_in.targets = targets
                stand_in(hidden).sum().backward()
            else:
                F.cross_entropy(head(hidden)[0], targets, reduction="sum").backward()
        found[name] = largest.elements
    assert found["chunks"] == 16 * 1000
    assert found["plain"] == 64 * 1000, "vacuous: the measure misses tensors"


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
        with pytest.raises(ValueError, match="to match target batch_size"):
            loss_sum(model, broken)
        assert torch.equal(model(**inputs).logits, before), "an error left the targets behind"
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, before)
    assert list(model.state_dict()) == names
