"""Where an answer's objects stand on the pictures that the model sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwenvl_ft.errors import unknown_name
from qwenvl_ft.look.objects import Named, all_objects
from qwenvl_ft.recipe.schema import Recipe

Size = tuple[int, int]
"""(width, height) in pixels."""

AUTO, PIXELS = "auto", "pixels"
FAR_SIDES: dict[str, float] = {"norm1000": 1000, "norm100": 100, "unit": 1}
"""Unit of coordinates -> what the far side of a picture is in it."""
UNITS = (AUTO, *FAR_SIDES, PIXELS)
EMIT_NORMS = {"norm1000": "norm1000", "norm100": "norm100", "none": PIXELS}


@dataclass(frozen=True)
class Placed:
    """An object on a picture."""

    picture: int | None
    """Index of its picture; None if the answer does not say which."""
    kind: str
    desc: str
    label: str
    """Its class."""
    points: list[tuple[float, float]]
    """In shares of the picture's sides, 0 to 1."""
    told: list[float]
    """Its numbers as the answer has them."""

    @property
    def anchor(self) -> tuple[float, float]:
        """Where its name stands: a line's first point, else the top left corner of its extent."""
        if self.kind == "line":
            return self.points[0]
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys)

    @property
    def numbers(self) -> str:
        return ", ".join(f"{value:g}" for value in self.told)


def check_units(units: str) -> str:
    """Raises RecipeError if there is no such unit."""
    if units not in UNITS:
        raise unknown_name("--units", units, UNITS)
    return units


def guess_units(named: Sequence[Named]) -> str:
    """Shares if all numbers are, pixels if one is above a thousand, else thousandths, in which Qwen3-VL answers."""
    values = [value for each in named if each.found is not None for value in each.found.points.ravel().tolist()]
    if values and max(values) <= 1 and any(value % 1 for value in values):
        return "unit"
    return PIXELS if values and max(values) > 1000 else "norm1000"


def placed_objects(
    answers: Sequence[str], before: Sequence[str], stored: Sequence[Size], units: str = AUTO
) -> tuple[list[Placed], str]:
    """The objects of all answers, and the unit in which they were read.

    Args:
        answers: the learned texts of a sample.
        before: the text that stands before each picture, whose end may name it.
        stored: size of each picture that pixels are told of.
    """
    named = [each for answer in answers for each in all_objects(answer)]
    units = guess_units(named) if units == AUTO else units
    groups = list(dict.fromkeys(each.group for each in named))
    placed: list[Placed] = []
    for each in named:
        if each.found is None:
            continue
        homes = picture_of(each.group, groups, before)
        places: list[int | None] = [*homes] or [None]
        for home in places:
            side = stored[home] if home is not None and units == PIXELS else None
            far = FAR_SIDES[units] if units in FAR_SIDES else 1.0
            across = [(float(x), float(y)) for x, y in each.found.points]
            points = [(x / (side[0] if side else far), y / (side[1] if side else far)) for x, y in across]
            told = [value for point in across for value in point]
            placed.append(Placed(home, each.found.kind, each.found.desc, each.found.label, points, told))
    return placed, units


def picture_of(group: str, groups: Sequence[str], before: Sequence[str]) -> list[int]:
    """Which pictures a group of objects belongs to: those that its key stands before, else the one in its place."""
    labelled = [k for k, text in enumerate(before) if group and text.rstrip().rstrip(":").endswith(group)]
    if labelled:
        return labelled
    if len(before) == 1 and len(groups) == 1:
        return [0]
    return [groups.index(group)] if group and len(groups) == len(before) else []


def emitted_units(recipe: Recipe) -> str:
    """The unit that a recipe's dense captions are written in."""
    told = getattr(recipe.data, "emit_norm", None)
    return EMIT_NORMS[told] if told in EMIT_NORMS else AUTO
