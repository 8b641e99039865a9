"""What an epoch will be: how samples fill rows, how many steps it takes, what share of it is images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenvl_ft.data.plan.packing import fill, pack_lengths
from qwenvl_ft.recipe.schema import Recipe

BINS = 12
"""Bars of a histogram, about."""
QUANTILES = {"least": 0.0, "median": 0.5, "95%": 0.95, "most": 1.0}
Bar = tuple[float, float, int]
"""(from, up to, how many): the upper end belongs to the next bar, except the last one's."""


@dataclass(frozen=True)
class Forecast:
    """An epoch over samples of known lengths."""

    samples: int
    tokens: int
    vision_share: float
    """Of all tokens, 0 to 1."""
    supervised_share: float
    rows: int
    """Rows of an epoch; without packing, samples."""
    fill: float | None
    """Share of the packed rows' places that hold a token; None without packing."""
    rows_per_step: int
    steps_per_epoch: int
    max_length: int
    longest: int


def forecast(
    recipe: Recipe, lengths: Sequence[int], vision: Sequence[int], supervised: Sequence[int], *, processes: int = 1
) -> Forecast:
    """The epoch that a recipe makes of samples; there must be one.

    Args:
        lengths, vision, supervised: tokens of each sample, and those of its images and of its answers.
        processes: GPUs that the run will have.
    """
    told, limit = recipe.training.arguments, recipe.template.max_length
    packing = recipe.training.packing
    rows = pack_lengths(lengths, max_length=limit, seed=told["seed"]) if packing else [[k] for k in range(len(lengths))]
    per_step = processes * told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
    tokens = sum(lengths)
    return Forecast(
        samples=len(lengths),
        tokens=tokens,
        vision_share=sum(vision) / tokens,
        supervised_share=sum(supervised) / tokens,
        rows=len(rows),
        fill=fill(rows, lengths, limit) if packing else None,
        rows_per_step=per_step,
        steps_per_epoch=math.ceil(len(rows) / per_step),
        max_length=limit,
        longest=max(lengths),
    )


def histogram(values: Sequence[float], bins: int = BINS) -> list[Bar]:
    """Bars with round borders; whole numbers get borders that are whole.

    Example:
        ``histogram([1, 2, 2, 9], 4)`` is ``[(0, 5, 3), (5, 10, 1)]``: the step is the next of 1, 2, 5, 10, ...
    """
    if not values:
        return []
    lowest, highest = min(values), max(values)
    step = _round_step((highest - lowest) / bins) if highest > lowest else 1.0
    if all(float(value).is_integer() for value in (lowest, highest)):
        step = max(step, 1.0)
    first = math.floor(lowest / step)
    count = math.floor(highest / step) - first + 1
    places = np.floor(np.asarray(values, dtype=np.float64) / step).astype(np.int64) - first
    counts = np.bincount(np.clip(places, 0, count - 1), minlength=count)
    return [(_tidy((first + k) * step), _tidy((first + k + 1) * step), int(n)) for k, n in enumerate(counts)]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Name -> value: the least, the middle, 95 of a hundred, the most. Each is one of the values."""
    ordered = sorted(values)
    return {name: ordered[int(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and their tenths) that is not below."""
    unit = 10.0 ** math.floor(math.log10(least))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least * (1 - 1e-9))


def _tidy(value: float) -> float:
    """Without what floating point adds."""
    return round(value, 10)
