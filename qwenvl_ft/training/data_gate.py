"""Is the data sound? Checks all records before training, as ``data.check_dataset_strategy`` asks for."""

from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from qwenvl_ft.checkpoint.manifest import are_joined
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.look.check_report import faults, one_line
from qwenvl_ft.look.readable import sensible_workers
from qwenvl_ft.recipe.schema import Recipe

MANY = 2_000
"""Samples with media from which a check of all pixels is offered before a run."""
TIMED = 4
"""Samples that are encoded to estimate how long a check takes."""
PATIENCE = timedelta(days=2)
"""Time that the other ranks wait for rank 0, which reads all records."""


def check_before_training(recipe: Recipe) -> None:
    """Check the data on rank 0 and share the verdict with all ranks.

    Raises:
        DataError: the data have errors and the strategy is ``error``; on every rank.
    """
    if recipe.data.check_dataset_strategy == "none":
        return
    joined = are_joined()
    verdict = [""]
    if not joined or torch.distributed.get_rank() == 0:
        verdict = [_verdict(recipe)]
    if joined:
        group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        torch.distributed.broadcast_object_list(verdict, group=group)
        torch.distributed.destroy_process_group(group)
    if verdict[0]:
        raise DataError(verdict[0])


def offer(recipe: Recipe, dataset: SampleDataset) -> str:
    """Return a line that offers a check of all pixels and its time; empty if there was one or the data are few.

    Before a run only the headers of images are read, so a damaged image stops it when its turn comes.
    """
    with_media = np.flatnonzero(dataset.at(dataset.present).patches)
    if recipe.data.check_dataset_strategy != "none" or len(with_media) < MANY:
        return ""
    begin = perf_counter()
    with suppress(DataError):  # it stops the run when its turn comes, as without this line
        for place in with_media[:: len(with_media) // TIMED][:TIMED]:
            _ = dataset[int(place)]
    seconds = (perf_counter() - begin) / TIMED * len(with_media) / sensible_workers(recipe)
    command = f"qwenvl-ft check {Path(recipe.training.arguments['output_dir']) / 'recipe.yaml'}"
    return f"images were not decoded yet; to find damaged ones, in about {max(1, seconds / 60):.0f} min: {command}"


def _verdict(recipe: Recipe) -> str:
    """Print the faults found; return why the run must not begin, or an empty string."""
    try:
        report = check_recipe(recipe)
    except QwenVLError as error:  # raised on all ranks, which wait for an answer
        return str(error)
    for line in faults(report):
        print(line, flush=True)
    if report.ok or recipe.data.check_dataset_strategy == "warning":
        print(f"data checked: {report.records:,} records, {len(report.errors()):,} errors", flush=True)
        return ""
    return f"data.check_dataset_strategy=error: {one_line(report)} All of them: qwenvl-ft check."
