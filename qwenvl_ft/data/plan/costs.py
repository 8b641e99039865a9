"""Estimates the training time of a sample, by which the plan balances the ranks.

``qwenvl-ft bench --fit`` measures the coefficients on this machine and stores them beside the other caches; otherwise
defaults apply. In a distributed run rank 0's coefficients hold for all ranks, because all ranks must compute the same
plan.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwenvl_ft.errors import DataError


@dataclass(frozen=True)
class CostModel:
    """Relative time of a sample of L tokens and P vision patches; one token costs 1."""

    patch: float = 0.25
    """Factor of P."""
    token_square: float = 1 / 32_768
    """Factor of L * L: attention of the language model."""
    patch_square: float = 1 / 262_144
    """Factor of P * P: attention of the vision tower."""

    def of(self, tokens: ArrayLike, patches: ArrayLike) -> NDArray[np.float64]:
        """Return float64[S], the relative time of each of S samples.

        Args:
            tokens: int[S]
            patches: int[S]
        """
        length, area = np.asarray(tokens, dtype=np.float64), np.asarray(patches, dtype=np.float64)
        return length + self.patch * area + self.token_square * length**2 + self.patch_square * area**2


def costs_file() -> Path:
    """Return the path of this machine's coefficients."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qwenvl_ft" / "costs.json"


def save_costs(costs: CostModel) -> Path:
    """Store coefficients for later runs on this machine."""
    path = costs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(costs)) + "\n", encoding="utf-8")
    return path


def machine_costs() -> CostModel:
    """Load this machine's coefficients, or return the defaults if there are none.

    Raises:
        DataError: `save_costs` did not write the file.
    """
    path = costs_file()
    if not path.is_file():
        return CostModel()
    try:
        return CostModel(**{name: float(value) for name, value in json.loads(path.read_text("utf-8")).items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a cost model: {error}. Remove it, or fit again: qwenvl-ft bench --fit."
        ) from None
