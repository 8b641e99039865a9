"""The pixels of a step: the cheapest way that is exact, for the same matrix that moves the coordinates."""

from PIL import Image

from qwenvl_ft.data.augment.geometry import Step, invert

Colour = tuple[int, int, int]
FLIPS: dict[tuple[float, float], Image.Transpose] = {
    (-1, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, -1): Image.Transpose.ROTATE_180,
}
"""Signs of the diagonal -> what PIL calls it."""
SAMPLING = Image.Resampling.BICUBIC
"""Resizing averages over the pixels that one output pixel covers; a warp takes the 4 x 4 pixels around its source."""


def render(image: Image.Image, step: Step, fill: Colour) -> Image.Image:
    """The image after a step; ``fill`` where nothing of it is.

    Mirroring, cropping and padding copy pixels. PIL's own transforms use continuous coordinates as we do: pixel i is
    sampled at i + 0.5.
    """
    a, b, c, d, e, f = step.matrix
    width, height = image.size
    if b == 0 and d == 0:
        if (a, e) in FLIPS and step.size == image.size and (c, f) == (width * (a < 0), height * (e < 0)):
            return image.transpose(FLIPS[a, e])
        if (a, e) == (1, 1) and c == int(c) and f == int(f):
            return _moved(image, int(c), int(f), step, fill)
        if (a, c, e, f) == (step.size[0] / width, 0, step.size[1] / height, 0):
            return image.resize(step.size, SAMPLING)
    return image.transform(step.size, Image.Transform.AFFINE, invert(step.matrix), SAMPLING, fillcolor=fill)


def _moved(image: Image.Image, x: int, y: int, step: Step, fill: Colour) -> Image.Image:
    """The image with its corner at (x, y) of a new canvas: a crop, a border or both."""
    canvas = Image.new(image.mode, step.size, fill)
    canvas.paste(image, (x, y))
    return canvas
