"""Checks that each sample of a packed row has the logits, losses and gradients that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import ones_like

from qwenvl_ft.prove.measure import Measured, measured, seen_logits, with_counts
from qwenvl_ft.prove.subject import FACTOR, Subject
from qwenvl_ft.prove.table import Row


def packed_row(subject: Subject) -> dict[str, Any]:
    """Put all samples in one row, with training's own collator."""
    total = sum(len(sample["input_ids"]) for sample in subject.samples)
    loader = subject.trainer_like(packing=True, max_length=total).get_train_dataloader()
    return with_counts(loader.collate_fn(subject.samples), subject.samples)


class Packed:
    """The check ``packed``."""

    name = "packed"

    def __init__(self) -> None:
        self.packed = Measured()
        self.leaked = Measured()

    def measure(self, subject: Subject) -> None:
        subject.say(f"{len(subject.samples)} samples in one packed row")
        row = packed_row(subject)
        context: dict[str, Any] = {"autocast": subject.autocast, "device": subject.device}
        self.packed = measured(subject.model, [row], share=subject.share, **context)
        self.leaked.logits = seen_logits(subject.model, [leaking(row)], **context)

    def rows(self, subject: Subject) -> Iterator[Row]:
        assert subject.alone is not None
        assert subject.reference is not None
        leak = min(error for _, error in list(self.leaked.errors(subject.reference, "logits"))[1:])
        for quantity, detail in (
            ("logits", ""),
            ("losses", " of each token"),
            ("gradients", f" by sample{subject.share}"),
        ):
            errors = self.packed.errors(subject.reference, quantity)
            noises = dict(subject.alone.errors(subject.reference, quantity))
            limits = [(where, error, FACTOR * noises[where] + subject.floor) for where, error in errors]
            # the worst error is the one closest to its limit, not the largest
            where, error, limit = max(limits, key=lambda entry: float("inf") if entry[1] != entry[1] else _share(entry))
            yield Row.judged(
                "packed = alone",
                f"{quantity}{detail} in a packed row; the worst is {where}",
                figure=error,
                tolerance=limit,
                **({"fault": leak} if quantity == "logits" else {}),
            )


def _share(entry: tuple[str, float, float]) -> float:
    return entry[1] / entry[2]


def leaking(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row as most trainers pass it: a mask of ones, and nothing that marks where samples begin."""
    borders = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "attention_mask")
    rest = {key: value for key, value in row.items() if key not in borders}
    return rest | {"position_ids": row["position_ids"][-3:], "attention_mask": ones_like(row["input_ids"])}
