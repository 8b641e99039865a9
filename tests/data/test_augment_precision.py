"""The distance of the answers' coordinates from what the model sees, through augmentation, text and resizing.

Marks are drawn into images. A chain of operations is read from a recipe section and drawn by epoch and record, as in
training; the processor resizes; the answer is read from the supervised tokens; the marks are located in the patches.
To print the figures:  python -m pytest -s tests/data/test_augment_precision.py
"""

import json

import numpy as np
import pytest
import torch
from cases import ListRecords
from mark_cases import HEIGHT, PICTURES, WIDTH, centre, differences, mark_objects, random_chain, to_nearest

from qwenvl_ft.data.augment.colour import COLOUR
from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.epochs import open_epochs
from qwenvl_ft.look.pictures import pictures

CHAINS = 500


@pytest.fixture(scope="module")
def raw_encoder(processor):
    return Encoder(processor, raw_pixels=True)


def samples_of(ops, seed, encoder):
    """Yield the two samples of a chain, which differ only in the colours of their marks."""
    for image in PICTURES:
        record = {"images": [image], "width": WIDTH, "height": HEIGHT, "objects": mark_objects()}
        augmenter = Augmenter.from_config({"ops": ops, "min_visible": 1.0})
        options = DenseOptions(images_per_user_turn=1, seed=seed, object_pattern="{i}", label_pattern="{i}")
        epochs = open_epochs(ListRecords([record]), options, augmenter=augmenter)
        assert isinstance(epochs, DenseGroups)
        yield encoder(epochs.conversation(1, 0))


def visible_image(sample, processor):
    ((image,),) = pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor)
    return image


def answered_centres(sample, processor, size):
    """Return the centres according to the answer, in pixels of the image that the model sees."""
    supervised = sample["input_ids"][sample["labels"] >= 0]
    (objects,) = json.loads(processor.tokenizer.decode(supervised, skip_special_tokens=True)).values()
    return np.array([centre(entry) for entry in objects.values()]) / 1000 * size


@pytest.fixture(scope="module")
def measured(raw_encoder):
    """float[marks, 2] over all chains: offset of the mark from the answer, in pixels that the model sees."""
    rng, processor, found = np.random.default_rng(1), raw_encoder.processor, []
    for seed in range(CHAINS):
        first, second = samples_of(random_chain(rng), seed, raw_encoder)
        assert torch.equal(first["input_ids"], second["input_ids"])
        images = visible_image(first, processor), visible_image(second, processor)
        found.append(to_nearest(answered_centres(first, processor, images[0].size), differences(*images)))
    return np.concatenate(found)


@pytest.mark.slow
def test_answers_are_within_half_a_pixel_of_what_the_model_sees(measured):
    distance = np.hypot(*measured.T)
    print(
        f"\n{CHAINS} chains, {len(distance):,} marks: max {np.abs(measured).max():.3f} pixels along an axis, "
        f"{distance.max():.3f} in all; mean {distance.mean():.3f}; bias {np.abs(measured.mean(axis=0)).max():.4f}"
    )
    assert len(distance) > 10_000, "vacuous: few marks stayed in the frame"
    assert np.abs(measured).max() < 0.5
    assert distance.mean() < 0.2


def test_a_place_of_another_chain_is_noticed(raw_encoder):
    """The same operations, drawn with another seed, give other coordinates."""
    ops = [{"rotate": {"max_deg": 30, "prob": 1}}, {"resize_by_scale": {"align_multiple": 7}}]
    first, second = samples_of(ops, 0, raw_encoder)
    other, _ = samples_of(ops, 1, raw_encoder)
    images = [visible_image(sample, raw_encoder.processor) for sample in (first, second)]
    assert images[0].size not in [image.size for image in PICTURES], "vacuous: nothing was resized"
    for sample, near in ((first, True), (other, False)):
        apart = to_nearest(answered_centres(sample, raw_encoder.processor, images[0].size), differences(*images))
        assert (np.abs(apart).max() < 0.5) == near


@pytest.mark.parametrize("name", COLOUR)
def test_a_colour_leaves_the_answer_as_it_is_to_the_bit(name, raw_encoder):
    plain, _ = samples_of([], 3, raw_encoder)
    coloured, _ = samples_of([{name: {"prob": 1}}], 3, raw_encoder)
    assert torch.equal(plain["input_ids"], coloured["input_ids"])
    assert torch.equal(plain["position_ids"], coloured["position_ids"])
    assert not torch.equal(plain["pixel_values"], coloured["pixel_values"]), "vacuous: it was not applied"
