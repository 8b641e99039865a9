"""Forecast of an epoch: rows, how full they are, optimizer steps, shares of image and supervised tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenvl_ft.data.plan.packing import RunShape, fill, pack_lengths
from qwenvl_ft.data.plan.step_size import StepSize
from qwenvl_ft.recipe.schema import Recipe

BINS = 12
"""Approximate number of bars of a histogram."""
QUANTILES = {"least": 0.0, "median": 0.5, "95%": 0.95, "most": 1.0}
Bar = tuple[float, float, int]
"""(low, high, count): ``high`` belongs to the next bar, except in the last bar."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of an epoch over samples of known lengths."""

    samples: int
    tokens: int
    vision_share: float
    """Share of all tokens, 0 to 1; likewise below."""
    supervised_share: float
    rows: int
    """Rows of an epoch; without packing, the number of samples."""
    fill: float | None
    """Share of the capacity of packed rows that holds tokens, 0 to 1; None without packing."""
    rows_per_step: int
    """Rows that fit into a step; an epoch may have fewer."""
    samples_per_step: float
    """Samples of a step, on average."""
    steps_per_epoch: int
    step: str
    """What a step holds, in words."""
    max_length: int
    longest: int


def forecast(
    recipe: Recipe, lengths: Sequence[int], vision: Sequence[int], supervised: Sequence[int], *, processes: int = 1
) -> Forecast:
    """Forecast an epoch over samples; there must be at least one.

    Args:
        lengths, vision, supervised: all tokens of each sample, its image tokens, its supervised tokens.
        processes: GPUs of the planned run.
    """
    arguments, limit = recipe.training.arguments, recipe.template.max_length
    packing = recipe.training.packing
    rows = (
        pack_lengths(lengths, max_length=limit, seed=arguments["seed"])
        if packing
        else [[k] for k in range(len(lengths))]
    )
    sharing = recipe.training.sequence_parallel_size
    batch, accumulation = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    shape = RunShape(max(processes // sharing, 1), batch, accumulation, sharing)
    step = StepSize(shape, len(rows), len(lengths), packing)
    tokens = sum(lengths)
    return Forecast(
        samples=len(lengths),
        tokens=tokens,
        vision_share=sum(vision) / tokens,
        supervised_share=sum(supervised) / tokens,
        rows=len(rows),
        fill=fill(rows, lengths, limit) if packing else None,
        rows_per_step=step.room,
        samples_per_step=step.samples_per_step,
        steps_per_epoch=step.steps,
        step=str(step),
        max_length=limit,
        longest=max(lengths),
    )


def histogram(values: Sequence[float], bins: int = BINS) -> list[Bar]:
    """Count values in bars with round limits; for whole numbers the limits are whole.

    Example:
        ``histogram([1, 8], 2)`` is ``[(0, 5, 1), (5, 10, 1)]``: the step 3.5 becomes 5, the next of 1, 2, 5, 10, ...
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
    """Return name -> value for `QUANTILES`; each is one of the values."""
    ordered = sorted(values)
    return {name: ordered[int(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, ... (and their tenths) that is not below ``least``."""
    unit = 10.0 ** math.floor(math.log10(least))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least * (1 - 1e-9))


def _tidy(value: float) -> float:
    """Remove floating-point noise."""
    return round(value, 10)
