"""Before training: ``data.check_dataset_strategy`` lets a run begin, warns, or stops it."""

from datetime import timedelta
from typing import Any

import torch

from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.look.check_report import faults, one_line
from qwenvl_ft.recipe.schema import Recipe

PATIENCE = timedelta(days=2)
"""How long the other processes wait for the one that looks."""


def check_before_training(recipe: Recipe) -> None:
    """Check the data as the recipe asks for. One process looks, all of them hear the verdict.

    Raises:
        DataError: there are errors, and the strategy is ``error``; on every rank.
    """
    strategy = recipe.data.check_dataset_strategy
    if strategy == "none":
        return
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    verdict = [""]
    if not joined or torch.distributed.get_rank() == 0:
        verdict = [_verdict(recipe, strategy)]
    if joined:
        group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        torch.distributed.broadcast_object_list(verdict, group=group)
        torch.distributed.destroy_process_group(group)
    if verdict[0]:
        raise DataError(verdict[0])


def _verdict(recipe: Recipe, strategy: str) -> str:
    """Why the run must not begin; empty if it may. What was found is printed."""
    try:
        report = check_recipe(recipe)
    except QwenVLError as error:  # the other ranks wait for an answer
        return str(error)
    for line in faults(report):
        print(line, flush=True)
    if report.ok or strategy == "warning":
        print(f"data checked: {report.records:,} records, {len(report.errors()):,} errors", flush=True)
        return ""
    return f"data.check_dataset_strategy=error: {one_line(report)} All of them: qwenvl-ft check."
