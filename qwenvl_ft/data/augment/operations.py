"""The operations of augmentation by name: the random numbers that each draws, and its effect on the frame.

There are three kinds. ``affine`` operations return a matrix; the matrices of consecutive ones are multiplied, and the
image is warped once. ``barrier`` operations change the canvas; pending warps are done before them. ``colour``
operations (colour.py) do not change coordinates; they run after all geometry.

Every operation draws the same number of random numbers whether it is applied or not, so that its probability does not
affect the draws of the next one.
"""

from dataclasses import dataclass
from math import ceil, cos, radians, sin
from typing import Any, ClassVar, Literal, Protocol

from numpy.random import Generator

from qwenvl_ft.data.augment.colour import COLOUR
from qwenvl_ft.data.augment.geometry import IDENTITY, Size, Step
from qwenvl_ft.data.augment.ranges import between, check_order, check_share
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.limits import NonNegativeFloat, Positive, PositiveFloat

Numbers = tuple[float, ...]
"""The numbers that an operation has drawn."""


class Operation(Protocol):
    """Interface of all kinds. ``affine`` and ``barrier`` add ``step(size, *drawn) -> Step``, ``colour`` adds
    ``apply(image, *drawn)``."""

    kind: ClassVar[Literal["affine", "barrier", "colour"]]

    @property
    def prob(self) -> float: ...

    def draw(self, rng: Generator) -> Numbers: ...


class Flip:
    """Base of the flips, which draw no numbers."""

    kind = "affine"

    def draw(self, rng: Generator) -> Numbers:
        return ()


@dataclass(frozen=True, kw_only=True)
class HFlip(Flip):
    """Mirror left and right."""

    prob: float = 0.5

    def step(self, size: Size) -> Step:
        return Step((-1.0, 0.0, float(size[0]), 0.0, 1.0, 0.0), size, (True, False))


@dataclass(frozen=True, kw_only=True)
class VFlip(Flip):
    """Mirror top and bottom."""

    prob: float = 0.1

    def step(self, size: Size) -> Step:
        return Step((1.0, 0.0, 0.0, 0.0, -1.0, float(size[1])), size, (False, True))


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Rotate about the centre."""

    kind = "affine"
    max_deg: NonNegativeFloat = 10.0
    """Largest angle in either direction, in degrees."""
    expand: bool = False
    """Enlarge the canvas so that no corner is cut off; False keeps its size."""
    prob: float = 0.5

    def draw(self, rng: Generator) -> Numbers:
        return (between(rng, (-self.max_deg, self.max_deg)),)

    def step(self, size: Size, degrees: float) -> Step:
        c, s = cos(radians(degrees)), sin(radians(degrees))
        width, height = size
        if self.expand:
            width, height = ceil(abs(c) * size[0] + abs(s) * size[1]), ceil(abs(s) * size[0] + abs(c) * size[1])
        x, y = size[0] / 2, size[1] / 2
        return Step((c, -s, width / 2 - c * x + s * y, s, c, height / 2 - s * x - c * y), (width, height))


@dataclass(frozen=True, kw_only=True)
class Factor:
    """Base of the operations that draw a factor between ``lo`` and ``hi``."""

    lo: PositiveFloat
    hi: PositiveFloat

    def __post_init__(self) -> None:
        check_order("lo", self.lo, "hi", self.hi)

    def draw(self, rng: Generator) -> Numbers:
        return (between(rng, (self.lo, self.hi)),)


@dataclass(frozen=True, kw_only=True)
class Scale(Factor):
    """Zoom about the centre without changing the canvas: factors above 1 crop, below 1 leave a border."""

    kind = "affine"
    lo: PositiveFloat = 0.9
    hi: PositiveFloat = 1.1
    prob: float = 0.5

    def step(self, size: Size, factor: float) -> Step:
        margin = (1 - factor) / 2
        return Step((factor, 0.0, margin * size[0], 0.0, factor, margin * size[1]), size)


@dataclass(frozen=True, kw_only=True)
class ResizeByScale(Factor):
    """Resize the whole image, with each side rounded up to a multiple."""

    kind = "barrier"
    lo: PositiveFloat = 0.8
    hi: PositiveFloat = 1.2
    scales: list[PositiveFloat] | None = None
    """Factors to choose from, instead of a range from lo to hi."""
    align_multiple: Positive = 32
    """Pixels; 1 for any size."""
    prob: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales is not None and not self.scales:
            raise RecipeError("scales: [] has nothing to choose from. Leave it out to draw between lo and hi.")

    def draw(self, rng: Generator) -> Numbers:
        share = rng.random()
        if self.scales is not None:
            return (self.scales[int(share * len(self.scales))],)
        return (self.lo + share * (self.hi - self.lo),)

    def step(self, size: Size, factor: float) -> Step:
        width, height = (_rounded_up(max(1, round(side * factor)), self.align_multiple) for side in size)
        return Step((width / size[0], 0.0, 0.0, 0.0, height / size[1], 0.0), (width, height))


@dataclass(frozen=True, kw_only=True)
class PadToMultiple:
    """Pad right and bottom up to a multiple; coordinates in pixels stay the same, normalised ones change."""

    kind = "barrier"
    prob: ClassVar[float] = 1.0
    multiple: Positive = 32
    """Pixels."""

    def draw(self, rng: Generator) -> Numbers:
        return ()

    def step(self, size: Size) -> Step:
        return Step(IDENTITY, (_rounded_up(size[0], self.multiple), _rounded_up(size[1], self.multiple)))


@dataclass(frozen=True, kw_only=True)
class RandomCrop(Factor):
    """Crop a random part of the image with the same aspect ratio."""

    kind = "barrier"
    lo: PositiveFloat = 0.8
    """Smallest share of each side that is kept."""
    hi: PositiveFloat = 1.0
    prob: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("hi", self.hi)

    def draw(self, rng: Generator) -> Numbers:
        return (*super().draw(rng), rng.random(), rng.random())

    def step(self, size: Size, share: float, at_x: float, at_y: float) -> Step:
        width, height = (max(1, round(side * share)) for side in size)
        left, top = int(at_x * (size[0] - width + 1)), int(at_y * (size[1] - height + 1))
        return Step((1.0, 0.0, float(-left), 0.0, 1.0, float(-top)), (width, height))


def _rounded_up(pixels: int, multiple: int) -> int:
    return -(-pixels // multiple) * multiple


OPERATIONS: dict[str, Any] = {
    "hflip": HFlip,
    "vflip": VFlip,
    "rotate": Rotate,
    "scale": Scale,
    "resize_by_scale": ResizeByScale,
    "pad_to_multiple": PadToMultiple,
    "random_crop": RandomCrop,
    **COLOUR,
}
"""Name in a recipe -> operation. Its fields are the parameters, with their defaults."""
