"""Colour operations: the size of the image and all coordinates stay unchanged.

They take and return 8-bit RGB images, and use PIL where possible.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

from qwenvl_ft.data.augment.clahe import equalize_adaptively
from qwenvl_ft.data.augment.ranges import Range, between, checked_range
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.limits import NonNegativeFloat, Positive, PositiveFloat

Picture = Image.Image


def table(function: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    """Return a function of the 256 levels as a table for `Image.point`, rounded and clipped to 0 to 255."""
    return np.clip(np.rint(function(np.arange(256.0))), 0, 255).astype(int).tolist()


@dataclass(frozen=True, kw_only=True)
class ColourOperation:
    """Base class: draws one number from each `Range` field, in the order of the fields."""

    kind: ClassVar[str] = "colour"
    any_sign: ClassVar[tuple[str, ...]] = ()
    """Names of the ranges that may be negative."""

    def __post_init__(self) -> None:
        for name in self.ranges():
            if (limits := getattr(self, name)) is not None:
                pair = checked_range(name, limits, lowest=None if name in self.any_sign else 0.0)
                object.__setattr__(self, name, pair)

    @classmethod
    def ranges(cls) -> list[str]:
        """Return the names of the `Range` fields."""
        return [f.name for f in fields(cls) if f.type in (Range, Range | None)]

    def draw(self, rng: Generator) -> tuple[float, ...]:
        return tuple(between(rng, getattr(self, name)) for name in self.ranges())


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColourOperation):
    """Multiply brightness, contrast about the mean grey, then saturation by a factor; null skips one of them."""

    brightness: Range | None = (0.7, 1.3)
    contrast: Range | None = (0.7, 1.3)
    saturation: Range | None = (0.7, 1.3)
    prob: float = 1.0

    def apply(self, image: Picture, brightness: float, contrast: float, saturation: float) -> Picture:
        image = ImageEnhance.Brightness(image).enhance(brightness)
        image = ImageEnhance.Contrast(image).enhance(contrast)
        return ImageEnhance.Color(image).enhance(saturation)


@dataclass(frozen=True, kw_only=True)
class Gamma(ColourOperation):
    """Map each level v to 255 * gain * (v / 255) ** gamma; a gamma below 1 brightens shadows."""

    gamma: Range = (0.7, 1.4)
    gain: PositiveFloat = 1.0
    prob: float = 1.0

    def apply(self, image: Picture, gamma: float) -> Picture:
        return image.point(table(lambda v: 255 * self.gain * (v / 255) ** gamma) * 3)


@dataclass(frozen=True, kw_only=True)
class Hsv(ColourOperation):
    """Rotate the hue, multiply saturation and value. PIL has 256 hues, so rotations are rounded to 1.4 degrees."""

    any_sign = ("hue_delta_deg",)
    hue_delta_deg: Range = (-20.0, 20.0)
    """Rotation of the hue in degrees."""
    sat: Range = (0.7, 1.4)
    val: Range = (0.7, 1.4)
    prob: float = 1.0

    def apply(self, image: Picture, degrees: float, saturation: float, value: float) -> Picture:
        hue = table(lambda h: (h + round(degrees / 360 * 256)) % 256)
        return (
            image.convert("HSV")
            .point(hue + table(lambda s: s * saturation) + table(lambda v: v * value))
            .convert("RGB")
        )


@dataclass(frozen=True, kw_only=True)
class Clahe(ColourOperation):
    """Contrast limited adaptive histogram equalization of the luma (Y of YCbCr)."""

    clip_limit: PositiveFloat = 3.0
    """Maximum number of pixels of one level in a tile, in multiples of (pixels of the tile / 256)."""
    tile_grid_size: tuple[Positive, Positive] = (8, 8)
    """Number of tiles (across, down)."""
    prob: float = 0.5

    def __post_init__(self) -> None:
        if len(self.tile_grid_size) != 2:
            raise RecipeError(f"tile_grid_size: {list(self.tile_grid_size)} is not [across, down].")
        object.__setattr__(self, "tile_grid_size", tuple(self.tile_grid_size))

    def apply(self, image: Picture) -> Picture:
        y, cb, cr = image.convert("YCbCr").split()
        across, down = self.tile_grid_size
        equalized = equalize_adaptively(np.asarray(y), clip_limit=self.clip_limit, tiles=(down, across))
        return Image.merge("YCbCr", (Image.fromarray(equalized), cb, cr)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Sharpness(ColourOperation):
    """Sharpen or smooth: factor 0 smooths, 1 changes nothing, above 1 sharpens."""

    factor: Range = (0.5, 1.8)
    prob: float = 0.4

    def apply(self, image: Picture, factor: float) -> Picture:
        return ImageEnhance.Sharpness(image).enhance(factor)


@dataclass(frozen=True, kw_only=True)
class Solarize(ColourOperation):
    """Invert all levels at or above the threshold."""

    threshold: NonNegativeFloat = 128
    prob: float = 0.3

    def apply(self, image: Picture) -> Picture:
        return image.point(table(lambda v: np.where(v >= self.threshold, 255 - v, v)) * 3)


@dataclass(frozen=True, kw_only=True)
class Posterize(ColourOperation):
    """Keep only the highest bits of each level."""

    bits: Positive = 4
    """Number of bits, 1 to 8."""
    prob: float = 0.3

    def __post_init__(self) -> None:
        if self.bits > 8:
            raise RecipeError(f"bits: {self.bits} is more than the 8 bits of a level.")

    def apply(self, image: Picture) -> Picture:
        return ImageOps.posterize(image, self.bits)


@dataclass(frozen=True, kw_only=True)
class AutoContrast(ColourOperation):
    """Stretch each channel to the full range of levels."""

    cutoff: NonNegativeFloat = 0.0
    """Percentage of the pixels to ignore at either end; below 50."""
    prob: float = 0.3

    def __post_init__(self) -> None:
        if self.cutoff >= 50:
            raise RecipeError(f"cutoff: {self.cutoff:g} percent at either end leaves nothing. Stay below 50.")

    def apply(self, image: Picture) -> Picture:
        return ImageOps.autocontrast(image, cutoff=self.cutoff)


@dataclass(frozen=True, kw_only=True)
class Equalize(ColourOperation):
    """Equalize the histogram of each channel."""

    prob: float = 0.3

    def apply(self, image: Picture) -> Picture:
        return ImageOps.equalize(image)


COLOUR: dict[str, Any] = {
    "color_jitter": ColorJitter,
    "gamma": Gamma,
    "hsv": Hsv,
    "clahe": Clahe,
    "sharpness": Sharpness,
    "solarize": Solarize,
    "posterize": Posterize,
    "auto_contrast": AutoContrast,
    "equalize": Equalize,
}
"""Name in a recipe -> colour operation."""
