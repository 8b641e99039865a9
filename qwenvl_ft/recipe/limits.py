"""Numeric types with limits, for the keys of a recipe. `values.LIMITS` holds the test and message of each limit."""

from typing import Annotated

Positive = Annotated[int, ">0"]
NonNegative = Annotated[int, ">=0"]
PositiveFloat = Annotated[float, ">0"]
NonNegativeFloat = Annotated[float, ">=0"]
Fraction = Annotated[float, "0..1"]
Share = Annotated[float, "0 to 1"]
OpenFraction = Annotated[float, "between 0 and 1"]
Count = Annotated[int, "count or -1"]
