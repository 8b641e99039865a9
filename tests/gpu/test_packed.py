"""In 16 bits a packed row differs from single samples only by rounding, no more than these differ from float32."""

import pytest
import torch

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.loss import loss_sum, split_labels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDER = (3, 1, 0, 4, 2)


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(mixed_records[i]) for i in ORDER]


def to_device(batch, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def logits(model, samples, device):
    """Return the logits of one row of samples, float64[T, V]."""
    row = to_device(QwenVLCollator()(samples), device)
    with torch.no_grad():
        return (
            model(**{key: value for key, value in row.items() if key not in ("labels", "sources")}).logits[0].double()
        )


def gradients(model, rows, device):
    """Return the summed loss, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    total = sum(loss_sum(model, to_device(split_labels(QwenVLCollator()(row)), device)) for row in rows)
    total.backward()
    return total.item(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_packed_equals_alone_within_rounding(checkpoints, samples, kind, device):
    """Compares norms, not elements, because a MoE model may route to other experts where two are nearly equal."""
    alone = [[sample] for sample in samples]
    results = {}
    for name, dtype in (("exact", "float32"), ("rounded", "bfloat16")):
        model = load_model(str(checkpoints[kind]), torch_dtype=dtype, attn_impl="packed_sdpa").to(device).train()
        results[name, "alone"] = (
            torch.cat([logits(model, row, device) for row in alone]),
            *gradients(model, alone, device),
        )
        results[name, "packed"] = logits(model, samples, device), *gradients(model, [samples], device)
    exact, rounded, packed = results["exact", "alone"], results["rounded", "alone"], results["rounded", "packed"]
    for part in (0, 2):
        allowed = 2 * distance(rounded[part], exact[part]) + 1e-3
        assert distance(packed[part], exact[part]) < allowed
        assert distance(results["exact", "packed"][part], exact[part]) < (1e-4 if device == "cpu" else 1e-2)
    assert packed[1] == pytest.approx(exact[1], rel=2e-2)
    moved = logits(model, samples[::-1], device)
    assert distance(moved, exact[0]) > 0.2, "vacuous: the samples in another order agree too"
