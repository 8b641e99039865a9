"""Ranges in the parameters of operations: checked once, drawn from with one random number each."""

from collections.abc import Sequence

from numpy.random import Generator

from qwenvl_ft.errors import RecipeError

Range = tuple[float, float]
"""Lowest and highest value; a recipe writes it as [lo, hi]."""


def between(rng: Generator, limits: Range | None) -> float:
    """A number in the range, 1 (nothing changes) without a range; always one draw."""
    share = float(rng.random())
    return 1.0 if limits is None else limits[0] + share * (limits[1] - limits[0])


def check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    """Refuse a range that is upside down."""
    if low > high:
        raise RecipeError(f"{low_name}: {low:g} is above {high_name}: {high:g}. Exchange them.")


def check_share(name: str, value: float) -> None:
    """Refuse a probability or share that is none."""
    if not 0 <= value <= 1:
        raise RecipeError(f"{name}: {value:g} is not between 0 and 1.")


def checked_range(name: str, limits: Sequence[float], *, lowest: float | None = 0.0) -> Range:
    """The range as a pair.

    Raises:
        RecipeError: not two numbers, upside down, or below ``lowest``.
    """
    if len(limits) != 2:
        raise RecipeError(f"{name}: {list(limits)} is not a range. Write [lowest, highest].")
    low, high = limits
    check_order(f"{name}[0]", low, f"{name}[1]", high)
    if lowest is not None and low < lowest:
        raise RecipeError(f"{name}: {low:g} is below {lowest:g}.")
    return low, high
