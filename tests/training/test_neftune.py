"""NEFTune's noise on a packed sample is as strong as on the sample alone, not as on its row."""

import pytest
import torch
from cases import make_trainer
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator
from qwenvl_ft.training.neftune import SampleNoise

ALPHA, WIDTH = 5.0, 64


def noise_of(batch):
    embedding = nn.Embedding(600, WIDTH).train()
    hook = SampleNoise(ALPHA)
    hook.follow(batch)
    plain = embedding(batch["input_ids"])
    embedding.register_forward_hook(hook)
    assert torch.equal(embedding.eval()(batch["input_ids"]), plain), "noise in evaluation"
    return embedding.train()(batch["input_ids"]) - plain


@pytest.mark.parametrize("padded", [False, True])
def test_each_sample_has_its_own_strength(encoder, mixed_records, padded):
    samples = [encoder(record) for record in mixed_records]
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert len(set(lengths)) > 2, "vacuous: all alike"
    noise = noise_of((PaddedCollator(0) if padded else QwenVLCollator())(samples)).detach()
    parts = [row[:length] for row, length in zip(noise, lengths, strict=True)] if padded else noise[0].split(lengths)
    for part, length in zip(parts, lengths, strict=True):
        limit = ALPHA / (length * WIDTH) ** 0.5
        assert 0.95 * limit < float(part.abs().max()) <= limit * (1 + 1e-5)
        assert float(part.std()) == pytest.approx(limit / 3**0.5, rel=0.1)


def test_alone_it_is_that_of_transformers(encoder, mixed_records):
    """With the same random numbers our noise on one sample is transformers'; in a row of several it is not."""
    batches = [QwenVLCollator()([encoder(record) for record in mixed_records[:count]]) for count in (1, 3)]
    for batch, same in zip(batches, (True, False), strict=True):
        torch.manual_seed(0)
        ours = noise_of(batch)
        torch.manual_seed(0)
        embedding = nn.Embedding(600, WIDTH).train()
        embedding.neftune_noise_alpha = ALPHA
        zeros = torch.zeros(*batch["input_ids"].shape, WIDTH)
        theirs = neftune_post_forward_hook(embedding, None, zeros)
        assert torch.allclose(ours, theirs, atol=1e-6) == same


def test_a_run_uses_it_and_no_other(tmp_path, tiny_dir, encoder, monkeypatch):
    calls = []
    plain = SampleNoise.__call__
    monkeypatch.setattr(SampleNoise, "__call__", lambda self, *a: calls.append(self.lengths) or plain(self, *a))
    trainer = make_trainer(tmp_path, tiny_dir, encoder, neftune_noise_alpha=ALPHA, max_steps=2)
    trainer.train()
    assert len(calls) >= 2
    assert all(lengths.numel() > 1 for lengths in calls)
    assert trainer.neftune_noise_alpha is None
