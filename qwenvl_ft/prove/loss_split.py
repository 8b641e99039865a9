"""Checks that a step's loss is the same however its samples are split over rows and micro-batches.

The step is run by the real trainer and compared with the mean over all supervised tokens, computed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from qwenvl_ft.prove.measure import Measured, Share, relative
from qwenvl_ft.prove.subject import FACTOR, Subject, run_to_end
from qwenvl_ft.prove.table import Row


@dataclass
class Step:
    """Loss and gradients of one optimizer step."""

    loss: float
    gradients: dict[str, Tensor]


class Split:
    """The check ``split``."""

    name = "split"

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}

    def measure(self, subject: Subject) -> None:
        for name, shape in splits([len(sample["input_ids"]) for sample in subject.samples]).items():
            subject.say(f"a step of {name}")
            self.steps[name] = one_step(subject.trainer_like(**shape), subject.share)

    def rows(self, subject: Subject) -> Iterator[Row]:
        assert subject.alone is not None
        assert subject.reference is not None
        expected, rounded = by_hand(subject.reference), by_hand(subject.alone)
        wrong = mean_of_means(subject.reference)
        subject.facts["splits"] = f"a step of {', '.join(self.steps)}"
        errors = {name: abs(step.loss - expected.loss) / expected.loss for name, step in self.steps.items()}
        worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
        yield Row.judged(
            "loss of any split",
            f"loss of the trainer's step in {len(self.steps)} splits; the worst is {worst}",
            figure=errors[worst],
            tolerance=FACTOR * subject.noise("losses") + subject.floor,
            note=f"a mean of means would differ by {abs(wrong.loss - expected.loss) / expected.loss:.1e}",
        )
        yield self._gradients(subject, expected, rounded, wrong)

    def _gradients(self, subject: Subject, expected: Step, rounded: Step, wrong: Step) -> Row:
        """Compare gradients; report the part and split that are closest to their limit."""
        found = []
        for part, gradient in expected.gradients.items():
            limit = FACTOR * relative(rounded.gradients[part], gradient) + subject.floor
            for name, step in self.steps.items():
                error = relative(step.gradients[part], gradient)
                fault = relative(wrong.gradients[part], gradient)
                found.append((error / limit if math.isfinite(error) else math.inf, error, limit, fault, part, name))
        _, error, limit, fault, part, name = max(found)
        return Row.judged(
            "loss of any split",
            f"gradient of these steps{subject.share}; the worst is {part}, {name}",
            figure=error,
            tolerance=limit,
            fault=fault,
        )


def splits(lengths: list[int]) -> dict[str, dict[str, Any]]:
    """Return name -> options of `Subject.trainer_like` for a step over samples of these lengths."""
    count, total = len(lengths), sum(lengths)
    half = max(max(lengths), -(-total // 2))
    shapes: dict[str, dict[str, Any]] = {"one packed row": {"packing": True, "max_length": total}}
    rows = packed_rows(lengths, half)
    shapes[f"{rows} packed rows in a pass each"] = {"packing": True, "max_length": half, "passes": rows}
    shapes["one sample a pass"] = {"packing": False, "max_length": total, "passes": count}
    shapes["two samples a pass"] = {"packing": False, "max_length": total, "rows": 2, "passes": -(-count // 2)}
    return shapes


def packed_rows(lengths: list[int], max_length: int) -> int:
    """Return the number of packed rows of the first epoch."""
    from qwenvl_ft.data.plan.packing import pack_lengths

    return len(pack_lengths(lengths, max_length=max_length))


def one_step(trainer: Any, share: Share) -> Step:
    """Run one optimizer step over all samples without changing the weights; return its loss and gradients."""
    kept: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            kept.update(share.taken(model))

    trainer.add_callback(Keep())
    run_to_end(trainer)
    trainer.model.zero_grad(set_to_none=True)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Step(float(logged[0]), kept)


def by_hand(measured: Measured) -> Step:
    """Compute the mean over all supervised tokens of all samples."""
    tokens = sum(len(losses) for losses in measured.losses)
    loss = float(torch.cat(measured.losses).double().sum()) / tokens
    return Step(loss, _summed(measured, [1 / tokens] * len(measured.losses)))


def mean_of_means(measured: Measured) -> Step:
    """Compute the mean over samples of each sample's mean loss, as a trainer with this fault does."""
    counts = [len(losses) for losses in measured.losses]
    loss = sum(float(losses.double().mean()) for losses in measured.losses) / len(counts)
    return Step(loss, _summed(measured, [1 / (count * len(counts)) for count in counts]))


def _summed(measured: Measured, weights: list[float]) -> dict[str, Tensor]:
    pairs = list(zip(measured.gradients, weights, strict=True))
    return {part: sum((g[part].double() * w for g, w in pairs), torch.zeros(())) for part in measured.gradients[0]}
