"""The worker's tensors for media give the same results as transformers' own path, without synchronisation."""

import copy

import pytest
import torch
from cases import MOST_KINDS
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model import packed_attention
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.training.loss import loss_sum, split_labels


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


def step(model, batch):
    """Return loss and gradients of a row."""
    model.zero_grad()
    loss = loss_sum(model, split_labels(batch))
    loss.backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("attn_impl", ["packed_sdpa", "sdpa"])
@pytest.mark.parametrize("kind", MOST_KINDS)
def test_loss_and_gradients_are_those_of_transformers_own_way(checkpoints, samples, kind, attn_impl):
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl=attn_impl).train()
    places = MediaPlaces.of(model)
    for chosen in (samples, samples[:1], [s for s in samples if "pixel_values_videos" in s], samples[-1:]):
        plain, placed = QwenVLCollator()(chosen), QwenVLCollator(places=places)(chosen)
        loss, gradients = step(model, plain)
        found, found_gradients = step(model, placed)
        torch.testing.assert_close(found, loss, rtol=1e-7, atol=0)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                found_gradients[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())
            )
    batch = QwenVLCollator(places=places)(samples)
    batch["image_places"] = batch["image_places"].flip(0)
    assert not torch.allclose(step(model, batch)[0], step(model, QwenVLCollator()(samples))[0]), (
        "vacuous: places unread"
    )


def test_a_model_of_another_kind_or_a_copy_is_as_it_was(checkpoints, samples):
    model = load_model(checkpoints["dense"], torch_dtype="float32")
    row = {
        key: value for key, value in QwenVLCollator(places=MediaPlaces.of(model))(samples).items() if key != "sources"
    }
    row.pop("labels")
    twin = copy.deepcopy(model)
    assert MediaPlaces.of(twin) == MediaPlaces.of(model)
    with torch.no_grad():
        before = model(**row).logits
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**row).logits.any(), "the copy runs with the weights of the original"
        assert torch.equal(model(**row).logits, before)
    assert MediaPlaces.of(torch.nn.Linear(2, 2)) is None
    spread = load_model(checkpoints["dense"], torch_dtype="float32", device_map={"": "cpu"})
    with torch.no_grad():
        torch.testing.assert_close(spread(**{k: v for k, v in row.items() if "places" not in k}).logits, before)


class Waits(TorchDispatchMode):
    """Fails on operations that synchronise with a GPU: reading a value, or a result whose size depends on one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2") or (
            name == "repeat_interleave" and "output_size" not in (kwargs or {})
        ):
            self.found.append(name)
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(f"{name} by a mask")
        return function(*args, **(kwargs or {}))


def as_long(query, key, value, *more, enable_gqa=False, **options):
    """Replaces the GPU kernel: returns its shape, and does not read the borders."""
    return query * 1.0 + value.repeat_interleave(query.shape[1] // key.shape[1], 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_never_wait(checkpoints, samples, monkeypatch, checkpointing):
    model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="packed_sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(packed_attention, "_kernel", lambda: as_long)
    monkeypatch.setattr(packed_attention, "_kernel_dtype", lambda value: torch.float32)
    listed = []
    to_list = torch.Tensor.tolist
    batches = [QwenVLCollator()(samples), QwenVLCollator(places=MediaPlaces.of(model))(samples)]
    plain, placed = (split_labels(batch) for batch in batches)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: listed.append(1) or to_list(tensor))
    with Waits() as waits:
        loss_sum(model, placed).backward()
    assert not waits.found
    assert not listed
    with Waits() as waits:
        loss_sum(model, plain).backward()
    assert {"index by a mask", "_local_scalar_dense"} <= set(waits.found), "vacuous: nothing is seen"
    assert listed
