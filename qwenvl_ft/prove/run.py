"""All checks of a proof, in an order in which the model is loaded once and at most one copy of it is held."""

import gc
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.prove.frozen import Frozen
from qwenvl_ft.prove.packed import Packed
from qwenvl_ft.prove.reference import attention_of, measure_alone, measure_reference
from qwenvl_ft.prove.room import shortages
from qwenvl_ft.prove.saved import Saved
from qwenvl_ft.prove.settings import ProofOptions, first_phase, proof_recipe
from qwenvl_ft.prove.split import Split
from qwenvl_ft.prove.subject import Subject, build_subject, still
from qwenvl_ft.prove.table import Report, Row
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.probe import fallbacks

PACKAGES = ("qwenvl-ft", "torch", "transformers", "peft", "accelerate")


class Check(Protocol):
    """One promise. `Frozen` is measured first: its training steps are what the others look at."""

    name: str

    def measure(self, subject: Subject) -> None:
        """Find out everything that needs the trained model."""

    def rows(self, subject: Subject) -> Any:
        """Compare, once the reference is known and the trained model is gone."""


CHECKS: dict[str, Callable[[], Any]] = {"frozen": Frozen, "packed": Packed, "split": Split, "saved": Saved}
"""Name -> check. ``merged`` is a part of ``saved``."""


def prove(
    recipe: Recipe, options: ProofOptions | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Prove the promises on a recipe's model, data and method. Everything that is written lies in a temporary folder.

    Args:
        say: is given a line for each thing that takes a while.

    Raises:
        QwenVLError: the recipe, the model or the data is wrong, as of a run.
    """
    options, start = options or ProofOptions(), time.monotonic()
    recipe, left_out = first_phase(recipe)
    with TemporaryDirectory(prefix="qwenvl-ft-prove-", dir=options.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        subject = build_subject(proof_recipe(recipe, options.steps, folder / "run"), options, folder, say)
        subject.facts |= facts(subject)
        report = Report(facts=subject.facts, warnings=left_out)
        report.warnings += [*fallbacks(), *shortages(subject.model, subject.device, folder)]
        for line in report.warnings:
            say(f"warning: {line}")
        try:
            report.rows = rows_of(subject)
        except torch.OutOfMemoryError as error:
            cause = str(error).partition(". ")[0]
            raise RecipeError(
                f"out of memory: {cause}. Lower --samples or --max-tokens, freeze more, or take a smaller model."
            ) from error
    report.seconds = time.monotonic() - start
    return report


def rows_of(subject: Subject) -> list[Row]:
    """Train, measure, let the model go, compare."""
    skip = subject.options.skip
    checks: dict[str, Any] = {name: make() for name, make in CHECKS.items()}
    chosen = {name: check for name, check in checks.items() if name not in skip}
    checks["frozen"].measure(subject)
    still(subject.model)
    for name, check in chosen.items():
        if name != "frozen":
            check.measure(subject)
    measure_alone(subject)
    measure_reference(subject)
    subject.release()
    if "saved" in chosen:
        chosen["saved"].merge(subject)
        gc.collect()
    return [row for check in chosen.values() for row in check.rows(subject)]


def facts(subject: Subject) -> dict[str, str]:
    """What the rows were found with."""
    recipe, device, data = subject.recipe, subject.device, subject.recipe.data.train
    tokens = sum(len(sample["input_ids"]) for sample in subject.samples)
    source = ", ".join(data) if isinstance(data, list | dict) else data or "records made up"
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return {
        "model": f"{recipe.model.model}, {sum(p.numel() for p in subject.model.parameters()):,} parameters",
        "method": f"{recipe.tuner.train_type}, {subject.share.total:,} weights train",
        "data": f"{len(subject.samples)} samples, {tokens:,} tokens, of {source}",
        "precision": f"{str(subject.dtype).removeprefix('torch.')}, attention {attention_of(subject)}",
        "device": here,
        "versions": f"Python {sys.version.split()[0]}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
    }
