"""A packed row gives every sample the logits, loss and gradients of the sample alone."""

import pytest
import torch
from cases import KINDS, gradient_tolerance

from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator, tokens_per_sample, vision_fillers
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.loss import loss_sum, split_labels

SETTINGS = [
    (kind, training, checkpointing, attention)
    for kind in KINDS
    for training in (False, True)
    for checkpointing in ((False, True) if training else (False,))
    for attention in ("sdpa", "eager", "packed_sdpa")
]


def relative(a, b):
    """Return the largest difference divided by the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def gradients(model, batches):
    """Return the gradients of the summed loss over all batches, by name."""
    model.zero_grad(set_to_none=True)
    total = sum(loss_sum(model, split_labels(batch)) for batch in batches)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def media_free(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "sources")}


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


@pytest.mark.parametrize(("kind", "training", "checkpointing", "attention"), SETTINGS)
def test_packed_equals_alone(checkpoints, samples, kind, training, checkpointing, attention):
    """Image, several images, video, both, and text alone as neighbours, in several orders."""
    model = load_model(str(checkpoints[kind]), torch_dtype="float32", attn_impl=attention).train(training)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    collate = QwenVLCollator()
    order = [samples[i] for i in (3, 1, 0, 4, 2)]
    with torch.no_grad():
        alone = torch.cat([model(**media_free(collate([sample]))).logits for sample in order], dim=1)
        packed = model(**media_free(collate(order))).logits
        batch = media_free(collate(order))
        batch = {key: value for key, value in batch.items() if not key.startswith(("cu_seq_lens", "max_length"))}
        leaked = model(**(batch | {"position_ids": batch["position_ids"][1:]})).logits
    assert float((packed - alone).abs().max()) <= 1e-5
    assert float((leaked - alone).abs().max()) > 1e-2, "vacuous: plain attention agrees too"
    loss_alone, grads_alone = gradients(model, [collate([sample]) for sample in order])
    loss_packed, grads_packed = gradients(model, [collate(order)])
    tokens = sum(int((sample["labels"] != -100).sum()) for sample in order)
    assert abs(loss_packed - loss_alone) / tokens <= 1e-6
    assert grads_alone.keys() == grads_packed.keys()
    for name, expected in grads_alone.items():
        assert relative(grads_packed[name], expected) <= gradient_tolerance(name), name


def test_the_public_batch_goes_straight_into_the_model(tiny_model, samples):
    """A notebook's ``model(**batch)``: the upstream loss of the whole row is the mean over its supervised tokens."""
    batch = QwenVLCollator()(samples)
    loss = tiny_model(**batch).loss
    ours = split_labels(batch)
    assert float(loss_sum(tiny_model, ours)) / ours["targets"].numel() == pytest.approx(float(loss), rel=1e-6)


def test_padded_rows_give_the_same_loss(tiny_model, processor, samples):
    packed = split_labels(QwenVLCollator()(samples))
    padded = split_labels(PaddedCollator(processor.tokenizer.pad_token_id)(samples))
    assert padded["input_ids"].shape[0] == len(samples)
    torch.testing.assert_close(loss_sum(tiny_model, padded), loss_sum(tiny_model, packed), rtol=1e-6, atol=1e-5)


def test_a_vision_filler_changes_nothing_but_reaches_the_tower(tiny_model, processor, samples):
    """Text alone never calls the vision tower; with the filler its gradients are there and exactly zero."""
    text = [samples[1]]
    plain, plain_grads = gradients(tiny_model, [QwenVLCollator()(text)])
    filled_batch = QwenVLCollator(vision_fillers(processor, ("image", "video")))(text)
    filled, filled_grads = gradients(tiny_model, [filled_batch])
    assert abs(plain - filled) <= 1e-6 * abs(plain)
    assert not any(name.startswith("model.visual") for name in plain_grads), "vacuous: the tower ran without a filler"
    tower = {n: g for n, g in filled_grads.items() if n.startswith("model.visual")}
    assert len(tower) == sum(n.startswith("model.visual") for n, _ in tiny_model.named_parameters())
    assert all(not g.any() for g in tower.values())
    assert max(relative(filled_grads[name], plain_grads[name]) for name in plain_grads) <= 1e-5
    assert tokens_per_sample(filled_batch).tolist() == [len(text[0]["input_ids"]), 3, 3]


def test_only_supervised_tokens_reach_the_head(tiny_model, samples):
    seen = []
    hook = tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    loss_sum(tiny_model, split_labels(QwenVLCollator()(samples)))
    hook.remove()
    supervised = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    assert seen == [(1, supervised, tiny_model.config.text_config.hidden_size)]
    assert supervised < sum(len(sample["input_ids"]) for sample in samples) / 2


def test_a_row_without_labels_gives_zero_loss_and_zero_gradients(tiny_model, samples):
    sample = dict(samples[0], labels=torch.full_like(samples[0]["labels"], -100))
    total, grads = gradients(tiny_model, [QwenVLCollator()([sample])])
    assert total == 0.0
    assert grads
    assert not any(g.any() for g in grads.values())
