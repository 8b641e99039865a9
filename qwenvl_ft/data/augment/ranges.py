"""Ranges in the parameters of operations: their checks, and drawing a number from one."""

from collections.abc import Sequence

from numpy.random import Generator

from qwenvl_ft.errors import RecipeError

Range = tuple[float, float]
"""(lowest, highest) value; written as [lo, hi] in a recipe."""


def between(rng: Generator, limits: Range | None) -> float:
    """Draw a number from the range, with exactly one random number; None gives 1, which changes nothing."""
    share = float(rng.random())
    return 1.0 if limits is None else limits[0] + share * (limits[1] - limits[0])


def check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise RecipeError if ``low`` is above ``high``."""
    if low > high:
        raise RecipeError(f"{low_name}: {low:g} is above {high_name}: {high:g}. Swap them.")


def check_share(name: str, value: float) -> None:
    """Raise RecipeError if a probability or share is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise RecipeError(f"{name}: {value:g} is not between 0 and 1.")


def checked_range(name: str, limits: Sequence[float], *, lowest: float | None = 0.0) -> Range:
    """Return the range as a pair.

    Raises:
        RecipeError: it is not two numbers in ascending order, or is below ``lowest``.
    """
    if len(limits) != 2:
        raise RecipeError(f"{name}: {list(limits)} is not a range. Write [lowest, highest].")
    low, high = limits
    check_order(f"{name}[0]", low, f"{name}[1]", high)
    if lowest is not None and low < lowest:
        raise RecipeError(f"{name}: {low:g} is below {lowest:g}.")
    return low, high
