"""Pixels and coordinates move together: marks drawn into an image are found again where their coordinates went."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cases import picture
from PIL import Image
from scipy import ndimage

from qwenvl_ft.data.augment.canvas import render
from qwenvl_ft.data.augment.colour import COLOUR
from qwenvl_ft.data.augment.geometry import IDENTITY, Step, compose
from qwenvl_ft.data.augment.operations import OPERATIONS, Rotate
from qwenvl_ft.data.augment.pipeline import Augmenter, Drawn
from qwenvl_ft.errors import DataError

WIDTH, HEIGHT, RADIUS = 320, 240, 7
INKS = ((230, 60, 20), (90, 200, 110))
FINE = 8
"""Marks are drawn this many times larger and averaged down, so that their centres are exact."""
WIDE = {
    "rotate": {"max_deg": 30},
    "scale": {"lo": 0.7, "hi": 1.4},
    "resize_by_scale": {"lo": 0.7, "hi": 1.5, "align_multiple": 7},
    "random_crop": {"lo": 0.6},
    "clahe": {"clip_limit": 2, "tile_grid_size": [2, 2]},
}
"""Wider than the defaults, for the geometry to have something to do."""


def marks():
    """Centres of the marks, at no particular fraction of a pixel."""
    rng = np.random.default_rng(5)
    grid = itertools.product(range(24, WIDTH, 45), range(24, HEIGHT, 45))
    return [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)) for x, y in grid]


def marked_pictures():
    """One soft ground, twice, with discs of two inks in turn; the other picture has the inks exchanged.

    Both have the same levels about equally often, so that an operation which looks at the whole picture (equalize)
    treats both alike, and they differ at the discs alone.
    """
    x, y = np.meshgrid((np.arange(WIDTH * FINE) + 0.5) / FINE, (np.arange(HEIGHT * FINE) + 0.5) / FINE)
    pictures = [picture(WIDTH // 8, HEIGHT // 8).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for _ in range(2)]
    for index, (mark_x, mark_y) in enumerate(marks()):
        disc = (x - mark_x) ** 2 + (y - mark_y) ** 2 < RADIUS**2
        coverage = Image.fromarray((disc * 255).astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        for image, ink in zip(pictures, (INKS, INKS[::-1])[index % 2], strict=True):
            image.paste(ink, mask=coverage)
    return pictures


PICTURES = marked_pictures()


def mark_objects():
    """Each mark as an object centred on it, of all three kinds in turn."""
    r = RADIUS + 1
    objects = []
    for index, (x, y) in enumerate(marks()):
        shapes = (
            {"bbox_2d": [x - r, y - r, x + r, y + r]},
            {"quad": [x - r, y - r, x + r, y - r, x + r, y + r, x - r, y + r]},
            {"line": [x - r, y, x, y - r, x + r, y, x, y + r]},
        )
        objects.append(shapes[index % 3] | {"desc": "mark"})
    return objects


def centre(entry):
    """Where an object says that its mark is."""
    points = np.reshape(next(entry[key] for key in ("bbox_2d", "quad", "line") if key in entry), (-1, 2))
    return points.mean(axis=0)


def found(drawn):
    """Centres of what differs between the two pictures."""
    first, second = (np.asarray(drawn.image(image)).astype(float) for image in PICTURES)
    difference = np.abs(first - second).sum(axis=2)
    labels, count = ndimage.label(difference > 0.2 * difference.max())
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(labels > 0, labels, index)
    centres = np.array(ndimage.center_of_mass(difference, labels, index)).reshape(-1, 2)[:, ::-1] + 0.5
    return centres[sizes > 12]


def offsets(drawn, told=None):
    """From where each wholly visible mark is said to be, to the nearest one found: float[marks, 2] in pixels."""
    objects, _ = (told or drawn).objects(mark_objects())
    places = found(drawn)
    apart = np.array([places - centre(entry) for entry in objects])  # [marks, found, 2]
    nearest = np.hypot(*apart.T).argmin(axis=0)
    return apart[np.arange(len(objects)), nearest]


def distances(drawn, told=None):
    return np.hypot(*offsets(drawn, told).T).tolist()


def random_chain(rng):
    """One to six operations in any order, any of them.

    Of solarize, clahe and equalize no two: together they can give both inks one level, and the marks are gone.
    """
    names = rng.permutation(sorted(OPERATIONS)).tolist()
    folding = [name for name in names if name in ("solarize", "clahe", "equalize")]
    names = [name for name in names if name not in folding[1:]][: rng.integers(1, 7)]
    ops = []
    for name in names:
        params = dict(WIDE[name]) if name in WIDE else {}
        if name != "pad_to_multiple":
            params["prob"] = 1
        if name == "rotate":
            params["expand"] = bool(rng.random() < 0.5)
        ops.append({"name": name, "params": params})
    return ops


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
    """No mark far off, and no drift of all of them: 0.01 pixel is a fiftieth of what a wrong half pixel would give."""
    measured = np.concatenate([offsets(replace(drawn, colours=())) for drawn in chains])
    assert np.hypot(*measured.T).max() < 0.15
    assert np.abs(measured.mean(axis=0)).max() < 0.01


@pytest.mark.parametrize("shift", [(1.0, 0.0), (0.0, -1.0)])
def test_a_matrix_that_is_off_by_one_is_noticed(shift):
    """The guard of the two tests above: coordinates moved one pixel beside the image's own."""
    drawn = draw([{"rotate": {"prob": 1}}, {"hflip": {"prob": 1}}])
    wrong = Step(compose((1.0, 0.0, shift[0], 0.0, 1.0, shift[1]), drawn.steps[0].matrix), drawn.size)
    assert max(distances(drawn)) < 0.1
    assert min(distances(drawn, told=replace(drawn, steps=(wrong,)))) > 0.5


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
    """The guard of the test above: the matrix that takes pixel centres for whole numbers."""
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
    """Turning left and right again must not blur twice, nor lose the corners between."""
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
    with pytest.raises(DataError, match="an image of 64x41 pixels stands in a record of 320x240"):
        draw(["equalize"]).image(picture(64, 41))


def test_the_size_is_known_before_any_pixel(chains):
    for drawn in chains[:100]:
        assert drawn.image(PICTURES[0]).size == drawn.size
    assert len({drawn.size for drawn in chains}) > 50, "vacuous: nothing changes the size"
