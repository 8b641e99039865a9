"""Operations that change colours and nothing else: the frame and every coordinate stay as they are.

They take and give RGB images of 8 bits; PIL does the work where it can.
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
    """A function of the 256 levels as the table that `Image.point` takes, rounded and kept in 0 to 255."""
    return np.clip(np.rint(function(np.arange(256.0))), 0, 255).astype(int).tolist()


@dataclass(frozen=True, kw_only=True)
class ColourOperation:
    """Draws one number from each range, in the order of the fields; an operation without ranges draws none."""

    kind: ClassVar[str] = "colour"
    any_sign: ClassVar[tuple[str, ...]] = ()
    """Ranges that may go below 0."""

    def __post_init__(self) -> None:
        for name in self.ranges():
            if (limits := getattr(self, name)) is not None:
                pair = checked_range(name, limits, lowest=None if name in self.any_sign else 0.0)
                object.__setattr__(self, name, pair)

    @classmethod
    def ranges(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.type in (Range, Range | None)]

    def draw(self, rng: Generator) -> tuple[float, ...]:
        return tuple(between(rng, getattr(self, name)) for name in self.ranges())


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColourOperation):
    """Brightness, contrast about the mean grey, then saturation, each times a factor; null leaves one as it is."""

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
    """255 * gain * (v / 255) ** gamma: below 1 lightens the shadows."""

    gamma: Range = (0.7, 1.4)
    gain: PositiveFloat = 1.0
    prob: float = 1.0

    def apply(self, image: Picture, gamma: float) -> Picture:
        return image.point(table(lambda v: 255 * self.gain * (v / 255) ** gamma) * 3)


@dataclass(frozen=True, kw_only=True)
class Hsv(ColourOperation):
    """Turn the hue, multiply saturation and value. PIL's HSV has 256 hues, so a turn is rounded to 1.4 degrees."""

    any_sign = ("hue_delta_deg",)
    hue_delta_deg: Range = (-20.0, 20.0)
    """Degrees of the colour circle."""
    sat: Range = (0.7, 1.4)
    val: Range = (0.7, 1.4)
    prob: float = 1.0

    def apply(self, image: Picture, degrees: float, saturation: float, value: float) -> Picture:
        turn = table(lambda h: (h + round(degrees / 360 * 256)) % 256)
        return (
            image.convert("HSV")
            .point(turn + table(lambda s: s * saturation) + table(lambda v: v * value))
            .convert("RGB")
        )


@dataclass(frozen=True, kw_only=True)
class Clahe(ColourOperation):
    """Contrast limited adaptive histogram equalization of the brightness (Y of YCbCr); hues stay."""

    clip_limit: PositiveFloat = 3.0
    """Most pixels of one level in a tile, in multiples of what each level had if all had the same."""
    tile_grid_size: tuple[Positive, Positive] = (8, 8)
    """Tiles across and down."""
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
    """0 is smoothed, 1 as it is, above 1 sharpened."""

    factor: Range = (0.5, 1.8)
    prob: float = 0.4

    def apply(self, image: Picture, factor: float) -> Picture:
        return ImageEnhance.Sharpness(image).enhance(factor)


@dataclass(frozen=True, kw_only=True)
class Solarize(ColourOperation):
    """Invert the levels from the threshold on."""

    threshold: NonNegativeFloat = 128
    prob: float = 0.3

    def apply(self, image: Picture) -> Picture:
        return image.point(table(lambda v: np.where(v >= self.threshold, 255 - v, v)) * 3)


@dataclass(frozen=True, kw_only=True)
class Posterize(ColourOperation):
    """Keep the high bits of each level."""

    bits: Positive = 4
    """1 to 8."""
    prob: float = 0.3

    def __post_init__(self) -> None:
        if self.bits > 8:
            raise RecipeError(f"bits: {self.bits} is more than the 8 of a level.")

    def apply(self, image: Picture) -> Picture:
        return ImageOps.posterize(image, self.bits)


@dataclass(frozen=True, kw_only=True)
class AutoContrast(ColourOperation):
    """Spread each channel over all levels."""

    cutoff: NonNegativeFloat = 0.0
    """Percent of the pixels that may be cut off at either end; below 50."""
    prob: float = 0.3

    def __post_init__(self) -> None:
        if self.cutoff >= 50:
            raise RecipeError(f"cutoff: {self.cutoff:g} percent at either end leaves nothing. Stay below 50.")

    def apply(self, image: Picture) -> Picture:
        return ImageOps.autocontrast(image, cutoff=self.cutoff)


@dataclass(frozen=True, kw_only=True)
class Equalize(ColourOperation):
    """Let every level of each channel be as frequent."""

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
