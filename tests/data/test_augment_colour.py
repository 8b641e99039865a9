"""Colour operations: coordinates stay bit-equal, nothing moves, and each operation follows its parameters."""

import colorsys

import numpy as np
import pytest
from cases import picture
from PIL import Image

from qwenvl_ft.data.augment.clahe import equalize_adaptively
from qwenvl_ft.data.augment.colour import COLOUR, AutoContrast, Clahe, ColorJitter, Gamma, Hsv, Posterize, Solarize
from qwenvl_ft.data.augment.pipeline import Augmenter

IMAGE = picture(96, 64)
LEVELS = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
OBJECTS = [
    {"bbox_2d": [1.1, 2, 30.7, 40]},
    {"quad": [0, 0, 96, 0, 96, 64, 0, 64]},
    {"line": [1, 1, 1, 1, 50.5, 60], "line_points": 3},
]


def drawn_with(name, seed=0, **params):
    augmenter = Augmenter.from_config({"ops": [{name: params | {"prob": 1}}]})
    return augmenter.draw(96, 64, np.random.default_rng(seed))


def as_array(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", COLOUR)
def test_coordinates_stay_to_the_bit_and_pixels_change(name):
    drawn = drawn_with(name, **({"cutoff": 5} if name == "auto_contrast" else {}))
    assert drawn.objects(OBJECTS) == (OBJECTS, [])
    assert drawn.steps == ()
    out = drawn.image(IMAGE)
    assert (out.size, out.mode) == (IMAGE.size, "RGB")
    assert (as_array(out) != as_array(IMAGE)).any(axis=2).mean() > 0.3


@pytest.mark.parametrize("name", COLOUR)
def test_nothing_moves(name):
    """An operation that moves no pixels commutes with mirroring.

    CLAHE does so approximately: like OpenCV, it measures distances to tile centres from pixel corners.
    """
    image = picture(640, 480)
    drawn = Augmenter.from_config({"ops": [{name: {"prob": 1}}]}).draw(640, 480, np.random.default_rng(0))
    for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        before, after = (as_array(drawn.image(image.transpose(flip))), as_array(drawn.image(image).transpose(flip)))
        np.testing.assert_allclose(before, after, atol=6 if name == "clahe" else 0)
        assert np.abs(before - np.roll(after, 1, axis=(0, 1))).max() > 12, "vacuous: a shift is not seen"


def test_colours_come_after_all_geometry_in_the_recipes_order():
    ops = [{"posterize": {"prob": 1}}, {"scale": {"lo": 0.5, "hi": 0.5, "prob": 1}}, {"gamma": {"gamma": [2, 2]}}]
    drawn = Augmenter.from_config({"ops": ops}).draw(96, 64, np.random.default_rng(0))
    assert [type(operation) for operation, _ in drawn.colours] == [Posterize, Gamma]
    border = round(255 * ((128 & 0xF0) / 255) ** 2)
    assert (as_array(drawn.image(IMAGE))[:16] == border).all()


def test_color_jitter_multiplies_in_the_order_brightness_contrast_saturation():
    out = as_array(ColorJitter().apply(LEVELS, 0.5, 1.0, 1.0))[..., 0].ravel()
    np.testing.assert_allclose(out, np.arange(256) / 2, atol=1)
    mean = as_array(LEVELS)[..., 0].mean()
    out = as_array(ColorJitter().apply(LEVELS, 1.0, 0.5, 1.0))[..., 0].ravel()
    np.testing.assert_allclose(out, mean + (np.arange(256) - mean) / 2, atol=1.5)
    grey = as_array(ColorJitter().apply(IMAGE, 1.0, 1.0, 0.0))
    assert (grey == grey[..., :1]).all()


def test_a_jitter_that_is_switched_off_leaves_its_part():
    drawn = drawn_with("color_jitter", brightness=None, saturation=None, contrast=[1.2, 1.2])
    assert drawn.colours[0][1] == (1.0, 1.2, 1.0)


@pytest.mark.parametrize(("gamma", "gain"), [(0.6, 1.0), (1.5, 1.0), (1.0, 1.3), (1.5, 0.5)])
def test_gamma_is_the_power_of_each_level(gamma, gain):
    out = as_array(Gamma(gain=gain).apply(LEVELS, gamma))[..., 0].ravel()
    np.testing.assert_array_equal(out, np.minimum(np.rint(255 * gain * (np.arange(256) / 255) ** gamma), 255))


def test_hsv_turns_the_hue_and_multiplies_the_rest():
    """Compared with colorsys pixel by pixel; quantising H, S and V to 256 levels costs some levels of RGB."""
    pixels = np.random.default_rng(0).integers(30, 200, (8, 8, 3), dtype=np.uint8)
    out = as_array(Hsv().apply(Image.fromarray(pixels), 60.0, 0.8, 1.2))
    for before, after in zip(pixels.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((h + 1 / 6) % 1, s * 0.8, min(v * 1.2, 1))) * 255
        np.testing.assert_allclose(after, expected, atol=8)
    unchanged = as_array(Hsv().apply(Image.fromarray(pixels), 0.0, 1.0, 1.0))
    assert np.abs(unchanged - pixels).max() <= 8
    assert np.abs(out - pixels).max() > 40, "vacuous: nothing was turned"


def test_solarize_inverts_from_the_threshold_on():
    out = as_array(Solarize(threshold=128).apply(LEVELS))[..., 0].ravel()
    np.testing.assert_array_equal(out, [v if v < 128 else 255 - v for v in range(256)])


def test_posterize_keeps_the_high_bits():
    out = as_array(Posterize(bits=3).apply(LEVELS))[..., 0].ravel()
    np.testing.assert_array_equal(out, np.arange(256) & 0b11100000)


def test_auto_contrast_uses_all_levels():
    dim = Image.fromarray((as_array(IMAGE) // 4 + 60).astype(np.uint8))
    out = as_array(AutoContrast().apply(dim))
    assert (out.min(axis=(0, 1)) == 0).all()
    assert (out.max(axis=(0, 1)) == 255).all()


def slow_clahe(channel, clip_limit, down, across):
    """Compute CLAHE by its definition, one pixel and one level at a time, for sizes that the tiles divide."""
    height, width = channel.shape
    th, tw = height // down, width // across
    tables = {}
    for i in range(down):
        for j in range(across):
            counts = [0] * 256
            for v in channel[i * th : (i + 1) * th, j * tw : (j + 1) * tw].ravel().tolist():
                counts[v] += 1
            limit = max(1, int(clip_limit * th * tw / 256))
            excess = sum(max(0, c - limit) for c in counts)
            counts = [min(c, limit) + excess // 256 for c in counts]
            rest = excess % 256
            for k in range(0, 256, max(1, 256 // rest) if rest else 256):
                if rest > 0:
                    counts[k] += 1
                    rest -= 1
            sums = np.cumsum(counts)
            tables[i, j] = [min(255, round(float(np.float32(s) * np.float32(255 / (th * tw))))) for s in sums]
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            fy, fx = y / th - 0.5, x / tw - 0.5
            i, j = int(np.floor(fy)), int(np.floor(fx))
            for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (fy - i if di else 1 - fy + i) * (fx - j if dj else 1 - fx + j)
                tile = (min(max(i + di, 0), down - 1), min(max(j + dj, 0), across - 1))
                out[y, x] += weight * tables[tile][channel[y, x]]
    return out


@pytest.mark.parametrize("clip_limit", [1.5, 4.0, 1000.0])
def test_clahe_is_its_definition(clip_limit):
    channel = np.asarray(picture(64, 48).convert("L")) // 3 + 50
    out = equalize_adaptively(channel, clip_limit=clip_limit, tiles=(3, 4))
    np.testing.assert_allclose(out, slow_clahe(channel, clip_limit, 3, 4), atol=0.51)
    assert out.std() > channel.std() * 1.1, "vacuous: no more contrast"


def test_clahe_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    channel = np.asarray(picture(160, 120).convert("L")) // 3 + 50
    reference = cv2.createCLAHE(clipLimit=3.0, tileGridSize=(8, 6)).apply(channel)
    out = equalize_adaptively(channel, clip_limit=3.0, tiles=(6, 8))
    assert np.abs(out.astype(int) - reference.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (101, 67)])
def test_clahe_takes_any_size(size):
    out = Clahe().apply(picture(*size))
    assert out.size == size
