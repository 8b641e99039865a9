"""Runs all checks of a proof; the model is loaded once, and at most one copy of it is in memory."""

import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.prove.capacity import shortages
from qwenvl_ft.prove.exact_reference import attention_of, measure_alone, measure_reference
from qwenvl_ft.prove.frozen import Frozen
from qwenvl_ft.prove.loss_split import Split
from qwenvl_ft.prove.packed import Packed
from qwenvl_ft.prove.proof_data import GENERATED
from qwenvl_ft.prove.proof_recipe import ProofOptions, first_phase, proof_recipe
from qwenvl_ft.prove.saved import Saved
from qwenvl_ft.prove.subject import Subject, build_subject, still
from qwenvl_ft.prove.table import Report, Row
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.whole import full_size

PACKAGES = ("qwenvl-ft", "torch", "transformers", "peft", "accelerate")


class Check(Protocol):
    """Check of one promise. `Frozen` is measured first, because the others use the model that it trains."""

    name: str

    def measure(self, subject: Subject) -> None:
        """Measure everything that needs the trained model."""

    def rows(self, subject: Subject) -> Iterator[Row]:
        """Compare with the reference, after the trained model has been released."""


CHECKS: dict[str, Callable[[], Any]] = {"frozen": Frozen, "packed": Packed, "split": Split, "saved": Saved}
"""Name -> check. ``merged`` is a part of ``saved``."""


def prove(
    recipe: Recipe, options: ProofOptions | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Verify the promises on a recipe's model, data and method. All files are written to a temporary folder.

    Args:
        say: callback that receives a line of text before each long step.

    Raises:
        QwenVLError: the recipe, the model or the data is wrong, as in training.
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
                f"out of memory: {cause}. Lower --samples or --max-tokens, freeze more, or use a smaller model."
            ) from error
    report.seconds = time.monotonic() - start
    return report


def rows_of(subject: Subject) -> list[Row]:
    """Train, measure, release the model, then compare."""
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
    """Describe the model, method, data, precision, device and versions."""
    recipe, device, data = subject.recipe, subject.device, subject.recipe.data.train
    tokens = sum(len(sample["input_ids"]) for sample in subject.samples)
    source = ", ".join(data) if isinstance(data, list | dict) else data or "generated records"
    if data and any(sample["source"].dataset == GENERATED for sample in subject.samples):
        source += ", and a generated one because these have answers of one length"
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return {
        "model": f"{recipe.model.model}, {sum(map(full_size, subject.model.parameters())):,} parameters",
        "method": f"{recipe.tuner.train_type}, {subject.share.total:,} weights train",
        "data": f"{len(subject.samples)} samples, {tokens:,} tokens, from {source}",
        "precision": f"{str(subject.dtype).removeprefix('torch.')}, attention {attention_of(subject)}",
        "device": here,
        "versions": f"Python {sys.version.split()[0]}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
    }
