"""Pictures with marks whose centres are known, and chains of operations that move them."""

import itertools

import numpy as np
from cases import picture
from PIL import Image
from scipy import ndimage

from qwenvl_ft.data.augment.operations import OPERATIONS

WIDTH, HEIGHT, RADIUS = 320, 240, 7
INKS = ((230, 60, 20), (90, 200, 110))
FINE = 8
"""Marks are drawn at this scale and averaged down, so that their centres are exact."""
WIDE = {
    "rotate": {"max_deg": 30},
    "scale": {"lo": 0.7, "hi": 1.4},
    "resize_by_scale": {"lo": 0.7, "hi": 1.5, "align_multiple": 7},
    "random_crop": {"lo": 0.6},
    "clahe": {"clip_limit": 2, "tile_grid_size": [2, 2]},
}
"""Wider ranges than the defaults, so that the geometry changes more."""


def marks():
    """Return the centres of the marks, at arbitrary fractions of a pixel."""
    rng = np.random.default_rng(5)
    grid = itertools.product(range(24, WIDTH, 45), range(24, HEIGHT, 45))
    return [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)) for x, y in grid]


def marked_pictures():
    """Return two pictures with the same smooth background and discs of two alternating colours, swapped in the second.

    The levels are about equally frequent in both, so that an operation that depends on the whole picture (equalize)
    treats both alike, and they differ only at the discs.
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
    """Return an object centred on each mark; the three kinds of geometry alternate."""
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
    """Return the centre of an object's geometry."""
    points = np.reshape(next(entry[key] for key in ("bbox_2d", "quad", "line") if key in entry), (-1, 2))
    return points.mean(axis=0)


def random_chain(rng):
    """Return one to six random operations in random order.

    At most one of solarize, clahe and equalize is used: two of them can map both colours to the same level, which
    erases the marks.
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


def differences(first, second):
    """Return the centres of the regions in which two pictures differ: float[found, 2] in pixels."""
    difference = np.abs(np.asarray(first).astype(float) - np.asarray(second).astype(float)).sum(axis=2)
    labels, count = ndimage.label(difference > 0.2 * difference.max())
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(labels > 0, labels, index)
    centres = np.array(ndimage.center_of_mass(difference, labels, index)).reshape(-1, 2)[:, ::-1] + 0.5
    return centres[sizes > 12]


def to_nearest(expected, found):
    """Return float[expected, 2]: the offset from each expected centre to the nearest one found, in pixels."""
    offsets = np.asarray(found)[None] - np.asarray(expected).reshape(-1, 1, 2)  # [expected, found, 2]
    nearest = np.hypot(*offsets.T).argmin(axis=0)
    return offsets[np.arange(len(offsets)), nearest]
