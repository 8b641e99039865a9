"""M-RoPE positions equal those of transformers' get_rope_index."""

import numpy as np
import pytest
import torch

from qwenvl_ft.data.encode.rope import mrope_positions


def upstream_positions(model, sample):
    """Compute the positions of one sample with transformers."""
    ids = sample["input_ids"][None]
    config = model.config
    kinds = torch.zeros_like(ids, dtype=torch.int32)
    kinds[ids == config.image_token_id] = 1
    kinds[ids == config.video_token_id] = 2
    positions, _ = model.model.get_rope_index(
        ids, kinds, image_grid_thw=sample.get("image_grid_thw"), video_grid_thw=sample.get("video_grid_thw")
    )
    return positions[:, 0]


@pytest.mark.parametrize("index", range(5))
def test_positions_equal_upstream(tiny_model, encoder, mixed_records, index):
    sample = encoder(mixed_records[index])
    torch.testing.assert_close(sample["position_ids"], upstream_positions(tiny_model, sample), rtol=0, atol=0)


def test_media_positions_are_not_the_trivial_ones(encoder, mixed_records):
    """Guard: a plain arange would fail the test above."""
    for record in (mixed_records[0], mixed_records[3]):
        sample = encoder(record)
        assert not torch.equal(sample["position_ids"][1], torch.arange(len(sample["input_ids"])))


def test_a_grid_by_hand():
    positions = mrope_positions(np.array([1, 1, 6, 1]), np.array([0, 0, 3, 0]))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_random_layouts_equal_upstream(tiny_model):
    """Grids of any shape in any order, with text between them."""
    rng = np.random.default_rng(0)
    config = tiny_model.config
    for _ in range(50):
        counts, widths, ids, grids = [], [], [], []
        for _ in range(rng.integers(1, 5)):
            text = rng.integers(1, 6)
            counts += [1] * text
            widths += [0] * text
            ids += [5] * text
            height, width = rng.integers(1, 7, 2)
            counts.append(height * width)
            widths.append(width)
            ids += [config.image_token_id] * (height * width)
            grids.append([1, 2 * height, 2 * width])
        sample = {"input_ids": torch.tensor(ids), "image_grid_thw": torch.tensor(grids)}
        ours = torch.from_numpy(mrope_positions(np.array(counts), np.array(widths)))
        torch.testing.assert_close(ours, upstream_positions(tiny_model, sample), rtol=0, atol=0)
