"""Places an answer's objects on the pictures that the model sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwenvl_ft.errors import unknown_name
from qwenvl_ft.look.objects import AnswerObject, all_objects
from qwenvl_ft.recipe.schema import Recipe

Size = tuple[int, int]
"""(width, height) in pixels."""

AUTO, PIXELS = "auto", "pixels"
FAR_SIDES: dict[str, float] = {"norm1000": 1000, "norm100": 100, "unit": 1}
"""Coordinate unit -> value of the right or bottom edge of a picture."""
UNITS = (AUTO, *FAR_SIDES, PIXELS)
EMIT_NORMS = {"norm1000": "norm1000", "norm100": "norm100", "none": PIXELS}


@dataclass(frozen=True)
class Placed:
    """An object on a picture."""

    picture: int | None
    """Index of its picture; None if the answer does not name one."""
    kind: str
    desc: str
    label: str
    """Class of the object."""
    points: list[tuple[float, float]]
    """(x, y) as shares of the picture's width and height, 0 to 1."""
    raw: list[float]
    """Coordinates as the answer writes them."""

    @property
    def anchor(self) -> tuple[float, float]:
        """Position of the label: a line's first point, otherwise the top left corner of the bounding box."""
        if self.kind == "line":
            return self.points[0]
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys)

    @property
    def numbers(self) -> str:
        return ", ".join(f"{value:g}" for value in self.raw)


def check_units(units: str) -> str:
    """Return ``units``; raises RecipeError if there is no such unit."""
    if units not in UNITS:
        raise unknown_name("--units", units, UNITS)
    return units


def guess_units(named: Sequence[AnswerObject]) -> str:
    """Guess the unit: shares if no number exceeds 1, pixels if one exceeds 1000, otherwise Qwen3-VL's thousandths."""
    values = [value for each in named if each.found is not None for value in each.found.points.ravel().tolist()]
    if values and max(values) <= 1 and any(value % 1 for value in values):
        return "unit"
    return PIXELS if values and max(values) > 1000 else "norm1000"


def placed_objects(
    answers: Sequence[str], before: Sequence[str], stored: Sequence[Size], units: str = AUTO
) -> tuple[list[Placed], str]:
    """Return the objects of all answers, and the unit in which they were read.

    Args:
        answers: the supervised texts of a sample.
        before: the text before each picture; its end may name the picture.
        stored: size of each picture to which pixel coordinates refer.
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
            raw = [value for point in across for value in point]
            placed.append(Placed(home, each.found.kind, each.found.desc, each.found.label, points, raw))
    return placed, units


def picture_of(group: str, groups: Sequence[str], before: Sequence[str]) -> list[int]:
    """Return the pictures of a group of objects: those after a text that ends with its key, otherwise by position."""
    labelled = [k for k, text in enumerate(before) if group and text.rstrip().rstrip(":").endswith(group)]
    if labelled:
        return labelled
    if len(before) == 1 and len(groups) == 1:
        return [0]
    return [groups.index(group)] if group and len(groups) == len(before) else []


def emitted_units(recipe: Recipe) -> str:
    """Return the coordinate unit of a recipe's dense captions."""
    norm = getattr(recipe.data, "emit_norm", None)
    return EMIT_NORMS[norm] if norm in EMIT_NORMS else AUTO
