"""Apply a geometric step to the pixels, with the matrix that moves the coordinates, in the cheapest exact way."""

from PIL import Image

from qwenvl_ft.data.augment.geometry import Step, invert

Colour = tuple[int, int, int]
FLIPS: dict[tuple[float, float], Image.Transpose] = {
    (-1, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, -1): Image.Transpose.ROTATE_180,
}
"""Signs of the matrix's diagonal -> PIL's operation."""
SAMPLING = Image.Resampling.BICUBIC
"""For resizing, PIL averages over the pixels that an output pixel covers; for a warp it takes 4 x 4 source pixels."""


def render(image: Image.Image, step: Step, fill: Colour) -> Image.Image:
    """Return the image after a step, with ``fill`` where the image does not reach.

    Mirroring, cropping and padding copy pixels. PIL's transforms use the same continuous coordinates as geometry.py:
    pixel i is sampled at i + 0.5.
    """
    a, b, c, d, e, f = step.matrix
    width, height = image.size
    if b == 0 and d == 0:
        if (a, e) in FLIPS and step.size == image.size and (c, f) == (width * (a < 0), height * (e < 0)):
            return image.transpose(FLIPS[a, e])
        if (a, e) == (1, 1) and c == int(c) and f == int(f):
            return _pasted(image, int(c), int(f), step, fill)
        if (a, c, e, f) == (step.size[0] / width, 0, step.size[1] / height, 0):
            return image.resize(step.size, SAMPLING)
    return image.transform(step.size, Image.Transform.AFFINE, invert(step.matrix), SAMPLING, fillcolor=fill)


def _pasted(image: Image.Image, x: int, y: int, step: Step, fill: Colour) -> Image.Image:
    """Paste the image at (x, y) into a new canvas, which crops it, adds a border, or both."""
    canvas = Image.new(image.mode, step.size, fill)
    canvas.paste(image, (x, y))
    return canvas
