"""Pixels and coordinates move together: marks drawn into an image are found where their coordinates moved."""

from dataclasses import replace

import numpy as np
import pytest
from cases import picture
from mark_cases import (
    HEIGHT,
    PICTURES,
    WIDTH,
    centre,
    differences,
    mark_objects,
    random_chain,
    to_nearest,
)

from qwenvl_ft.data.augment.colour import COLOUR
from qwenvl_ft.data.augment.geometry import IDENTITY, Step, compose
from qwenvl_ft.data.augment.operations import Rotate
from qwenvl_ft.data.augment.pipeline import Augmenter, Drawn
from qwenvl_ft.data.augment.render import render
from qwenvl_ft.errors import DataError


def offsets(drawn, coordinates_of=None):
    """Return float[marks, 2]: from the coordinates of each fully visible mark to the nearest mark found, in pixels.

    Args:
        coordinates_of: the augmentation that moves the coordinates, if not ``drawn``.
    """
    objects, _ = (coordinates_of or drawn).objects(mark_objects())
    return to_nearest([centre(entry) for entry in objects], differences(*map(drawn.image, PICTURES)))


def distances(drawn, coordinates_of=None):
    return np.hypot(*offsets(drawn, coordinates_of).T).tolist()


def draw(ops, seed=0, **settings):
    augmenter = Augmenter.from_config({"ops": ops, "min_visible": 1.0} | settings)
    return augmenter.draw(WIDTH, HEIGHT, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def chains():
    rng = np.random.default_rng(0)
    return [draw(random_chain(rng), seed) for seed in range(500)]


def test_marks_are_where_their_coordinates_say_after_500_chains(chains):
    measured = [distance for drawn in chains for distance in distances(drawn)]
    assert len(measured) > 10_000, "vacuous: few marks stayed in the frame"
    assert max(measured) < 0.5
    assert np.mean(measured) < 0.05
    assert {type(op).__name__ for drawn in chains for op, _ in drawn.colours} == {c.__name__ for c in COLOUR.values()}


def test_geometry_alone_is_exact_but_for_the_sampling(chains):
    """No mark is far off, and the mean offset is below 0.01 pixel, a fiftieth of a wrong half-pixel shift."""
    measured = np.concatenate([offsets(replace(drawn, colours=())) for drawn in chains])
    assert np.hypot(*measured.T).max() < 0.15
    assert np.abs(measured.mean(axis=0)).max() < 0.01


@pytest.mark.parametrize("shift", [(1.0, 0.0), (0.0, -1.0)])
def test_a_matrix_that_is_off_by_one_is_noticed(shift):
    """Guards the two tests above: the coordinates move one pixel further than the image."""
    drawn = draw([{"rotate": {"prob": 1}}, {"hflip": {"prob": 1}}])
    wrong = Step(compose((1.0, 0.0, shift[0], 0.0, 1.0, shift[1]), drawn.steps[0].matrix), drawn.size)
    assert max(distances(drawn)) < 0.1
    assert min(distances(drawn, coordinates_of=replace(drawn, steps=(wrong,)))) > 0.5


FLIPS = {
    "hflip": (["hflip"], lambda pixels: pixels[:, ::-1]),
    "vflip": (["vflip"], lambda pixels: pixels[::-1]),
    "both": (["hflip", "vflip"], lambda pixels: pixels[::-1, ::-1]),
    "twice": (["hflip", "hflip"], lambda pixels: pixels),
}


@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("name", FLIPS)
def test_flips_are_exact_to_the_bit(name, width):
    ops, reference = FLIPS[name]
    image = picture(width, 41)
    augmenter = Augmenter.from_config({"ops": [{op: {"prob": 1}} for op in ops]})
    drawn = augmenter.draw(width, 41, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(drawn.image(image)), reference(np.asarray(image)))


def test_a_flip_by_width_minus_one_would_leave_a_column_empty():
    """Guards the test above: this matrix wrongly assumes that pixel centres have integer coordinates."""
    image = picture(64, 41)
    wrong = Drawn(image.size, (Step((-1.0, 0.0, 63.0, 0.0, 1.0, 0.0), image.size),), fill=(0, 0, 0))
    pixels = np.asarray(wrong.image(image))
    assert not pixels[:, -1].any()
    assert not np.array_equal(pixels, np.asarray(image)[:, ::-1])


def test_chains_that_change_nothing_give_the_image_and_the_objects_as_they_are():
    ops = [
        {"rotate": {"max_deg": 0, "prob": 1}},
        {"scale": {"lo": 1, "hi": 1, "prob": 1}},
        {"resize_by_scale": {"lo": 1, "hi": 1, "align_multiple": 16}},
        {"random_crop": {"lo": 1, "prob": 1}},
        {"pad_to_multiple": {"multiple": 16}},
        {"hflip": {"prob": 0}},
        {"color_jitter": {"prob": 0}},
    ]
    for chain in ([], ops):
        drawn = draw(chain)
        assert drawn.steps == ()
        assert drawn.image(PICTURES[0]).tobytes() == PICTURES[0].tobytes()
        assert drawn.objects(mark_objects()) == (mark_objects(), [])


def test_padding_and_cropping_copy_pixels_and_fill_the_rest():
    image = picture(50, 41)
    pixels = np.asarray(image)
    padded = Augmenter.from_config({"ops": ["pad_to_multiple"], "fill": [1, 2, 3]})
    out = np.asarray(padded.draw(50, 41, np.random.default_rng(0)).image(image))
    assert out.shape == (64, 64, 3)
    np.testing.assert_array_equal(out[:41, :50], pixels)
    assert (out[41:] == [1, 2, 3]).all()
    assert (out[:, 50:] == [1, 2, 3]).all()
    cropped = Augmenter.from_config({"ops": [{"random_crop": {"lo": 0.5, "hi": 0.5, "prob": 1}}]})
    drawn = cropped.draw(50, 41, np.random.default_rng(0))
    left, top = -int(drawn.steps[0].matrix[2]), -int(drawn.steps[0].matrix[5])
    assert (left, top) != (0, 0)
    np.testing.assert_array_equal(np.asarray(drawn.image(image)), pixels[top : top + 20, left : left + 25])


def test_a_warp_fills_with_mid_grey_what_the_image_does_not_cover():
    drawn = draw([{"scale": {"lo": 0.5, "hi": 0.5, "prob": 1}}])
    pixels = np.asarray(drawn.image(PICTURES[0]))
    assert (pixels[:60] == 128).all()
    assert (pixels[:, :80] == 128).all()
    assert (pixels[60:180, 80:240] != 128).any(axis=2).mean() > 0.9


def test_affine_operations_in_a_row_are_one_warp():
    """Rotating there and back must neither blur twice nor cut off the corners in between."""
    there_and_back = Step(IDENTITY, (WIDTH, HEIGHT))
    for degrees in (20.0, -20.0):
        there_and_back = there_and_back.then(Rotate().step((WIDTH, HEIGHT), degrees))
    image = render(PICTURES[0], there_and_back, (0, 0, 0))
    np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(PICTURES[0]).astype(int), atol=1)
    chain = draw([{name: {"prob": 1}} for name in ("hflip", "rotate", "scale", "vflip", "rotate")])
    assert len(chain.steps) == 1
    split = draw([{"rotate": {"prob": 1}}, "resize_by_scale", {"rotate": {"prob": 1}}])
    assert len(split.steps) == 3, "vacuous: a barrier does not separate either"


def test_an_image_of_another_size_is_an_error():
    with pytest.raises(DataError, match="an image has 64x41 pixels, but its record states 320x240"):
        draw(["equalize"]).image(picture(64, 41))


def test_the_size_is_known_before_any_pixel(chains):
    for drawn in chains[:100]:
        assert drawn.image(PICTURES[0]).size == drawn.size
    assert len({drawn.size for drawn in chains}) > 50, "vacuous: nothing changes the size"
