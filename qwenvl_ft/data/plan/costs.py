"""What a sample costs, in time: what the plan balances ranks by. Fitted by ``qwenvl-ft bench --fit``, else a default.

The fit belongs to the machine: a file beside the other caches. Of several processes the first one's holds for all,
because all must make the same plan.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwenvl_ft.errors import DataError


@dataclass(frozen=True)
class CostModel:
    """Time of a sample of L tokens and P vision patches, a token being 1."""

    patch: float = 0.25
    token_square: float = 1 / 32_768
    """Of L * L: attention of the language model."""
    patch_square: float = 1 / 262_144
    """Of P * P: attention of the vision tower."""

    def of(self, tokens: ArrayLike, patches: ArrayLike) -> NDArray[np.float64]:
        """float64[S], relative time of each sample."""
        length, seen = np.asarray(tokens, dtype=np.float64), np.asarray(patches, dtype=np.float64)
        return length + self.patch * seen + self.token_square * length**2 + self.patch_square * seen**2


def costs_file() -> Path:
    """Where the machine's fit is."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "qwenvl_ft" / "costs.json"


def save_costs(costs: CostModel) -> Path:
    """Keep a fit for this machine's next runs."""
    path = costs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(costs)) + "\n", encoding="utf-8")
    return path


def machine_costs() -> CostModel:
    """The machine's fit, or the defaults.

    Raises:
        DataError: the file is not one that `save_costs` wrote.
    """
    path = costs_file()
    if not path.is_file():
        return CostModel()
    try:
        return CostModel(**{name: float(value) for name, value in json.loads(path.read_text("utf-8")).items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no cost model: {error}. Remove it, or fit it anew: qwenvl-ft bench --fit."
        ) from None
