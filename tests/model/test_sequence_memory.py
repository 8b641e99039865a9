"""What several ranks save by sharing a row of 16,384 tokens: activations, and time of the vision tower."""

import time

import pytest
import torch
import torch.distributed as dist
from rank_cases import in_ranks
from sequence_cases import CPU, images, model_of, padded, shared_row, text, whole_row

from qwenvl_ft.model.sequence_parallel import SequenceGroup, exchange_heads
from qwenvl_ft.training.device_batch import on_device
from qwenvl_ft.training.loss import loss_sum

TOKENS = 16_384


def long_row(encoder, places):
    """A row of about 16,384 tokens: texts of 1,000 words, and images of different sizes."""
    records, wide = [], [64, 128, 256, 512]
    tokens = 0
    while tokens < TOKENS:
        records.append(text(400) if len(records) % 2 else images(*wide * 4))
        tokens += len(encoder(records[-1])["input_ids"])
    return whole_row(encoder, records, places)


def measured(encoder, model, places):
    """Run by each rank: return tokens, bytes of the activations kept for the backward pass, and seconds of the tower.

    The seconds are those of this process on its core, so ranks that wait for one another do not count.
    """
    size = dist.get_world_size()
    group = SequenceGroup.of(size)
    exchange_heads(model.config.get_text_config())
    row = long_row(encoder, places)
    if size == 1:
        batch = on_device(row, CPU)
    else:
        batch = on_device(shared_row(row, size, group.place), CPU, group=group)
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept, spent = {}, []

    def keep(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    tower = model.model.visual
    tower.register_forward_pre_hook(lambda *_: spent.append(-time.process_time()))
    tower.register_forward_hook(lambda *_: spent.append(time.process_time()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = loss_sum(model.train(), batch)
    loss.backward()
    return padded(row, size)["input_ids"].shape[1], sum(kept.values()), sum(spent)


@pytest.mark.soak
def test_activations_and_the_towers_time_are_divided_by_the_ranks(encoder, checkpoints):
    model, places = model_of(checkpoints["dense"])
    (tokens, whole, seconds), *_ = in_ranks(1, measured, encoder, model, places)
    assert tokens >= TOKENS
    for size in (2, 4):
        found = in_ranks(size, measured, encoder, model, places)
        most, spent = max(rank[1] for rank in found), [rank[2] for rank in found]
        shares = ", ".join(f"{part / sum(spent):.1%}" for part in spent)
        ratio = most / whole * size
        print(f"\n{tokens} tokens, N={size}: {most / 2**20:.1f} of {whole / 2**20:.1f} MiB, {ratio:.3f} / N")
        print(f"of the tower's time: {shares}; in all {sum(spent) / seconds:.2f} times that of one process")
        assert ratio <= 1.1
        assert max(spent) <= sum(spent) / size * 1.3
        assert sum(spent) < 1.6 * seconds, "the tower runs more than once"
