"""Numbers with limits, as types of a recipe's keys; `convert` knows the words."""

from typing import Annotated

Positive = Annotated[int, ">0"]
NonNegative = Annotated[int, ">=0"]
PositiveFloat = Annotated[float, ">0"]
NonNegativeFloat = Annotated[float, ">=0"]
Fraction = Annotated[float, "0..1"]
Share = Annotated[float, "0 to 1"]
OpenFraction = Annotated[float, "between 0 and 1"]
Count = Annotated[int, "count or -1"]
