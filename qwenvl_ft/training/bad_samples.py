"""Logs, counts and limits the unreadable samples that placeholders replace (see `DataConfig.skips_unreadable`)."""

import logging
from typing import Any

import torch
from accelerate import Accelerator

from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import DataError
from qwenvl_ft.training.ranks import sum_over_ranks

logger = logging.getLogger("qwenvl_ft.data")


def log_bad_samples(batch: dict[str, Any]) -> int:
    """Log each record of a batch that a placeholder replaces; return their number."""
    faults = batch.get("faults", [])
    for fault in faults:
        logger.warning("left out: %s", fault)
    return len(faults)


def count_bad_samples(bad: int, dataset: SampleDataset, samples: int, accelerator: Accelerator) -> int:
    """Return the number of replaced samples, summed over all ranks; with ``on_error=raise`` 0, without communication.

    Args:
        bad: number of replaced samples on this rank.
        samples: number of the epoch's samples, over all ranks.

    Raises:
        DataError: more than ``data.max_bad_fraction`` of the samples were replaced; on every rank.
    """
    if dataset.on_error == "raise":
        return 0
    bad = int(sum_over_ranks(torch.tensor(bad, device=accelerator.device), accelerator))
    if bad > dataset.max_bad_fraction * samples:
        raise DataError(
            f"{dataset.name}: {bad} of the epoch's {samples} samples could not be made, more than "
            f"data.max_bad_fraction={dataset.max_bad_fraction:g}. The warnings above name them."
        )
    return bad
