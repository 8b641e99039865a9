"""Computes logits, losses and gradients of each sample of some rows, independently of the code under test.

Letters: K supervised tokens of a sample, V vocabulary size, G kept elements of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenvl_ft.data.collate import ASIDE, QwenVLCollator
from qwenvl_ft.data.conversation import IGNORE, Sample
from qwenvl_ft.model.anatomy import PARTS, part_of

if TYPE_CHECKING:
    from qwenvl_ft.prove.subject import Subject

KEPT_ELEMENTS = 20_000_000
"""Maximum number of gradient elements kept per sample: 80 MB."""
TINY = 1e-6
"""A gradient below this share of the largest counts as zero, as in the vision tower for a text-only sample."""
HALF_SCALE = 1024.0
"""Loss scale in float16, so that small gradients do not underflow."""


@dataclass(frozen=True)
class Share:
    """Selects every ``stride``-th element of the gradients, so that several gradients fit into memory."""

    stride: int
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Share:
        total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        stride = -(-total // KEPT_ELEMENTS)
        return cls(stride if stride == 1 else stride | 1, total)  # odd, or it could hit the same column of each matrix

    def taken(self, model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
        """Return part -> float32[G], on the CPU, divided by ``scale``."""
        found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[part_of(name)].append(grad.flatten()[:: self.stride].float().div(scale).cpu())
        return {part: torch.cat(pieces) for part, pieces in found.items() if pieces}

    def __str__(self) -> str:
        return "" if self.stride == 1 else f", each {self.stride}th of {self.total:,} elements"


@dataclass
class Measured:
    """Logits, losses and gradients, with one entry per sample."""

    logits: list[Tensor] = field(default_factory=list)
    """float32[K, V] at the positions that predict supervised tokens."""
    losses: list[Tensor] = field(default_factory=list)
    """float32[K], the loss of each supervised token."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Part -> float32[G], gradient of the sum of the sample's losses."""

    def errors(self, reference: Measured, quantity: str) -> Iterator[tuple[str, float]]:
        """Yield (name, relative difference) of each sample, and of each part for gradients.

        Args:
            quantity: ``logits``, ``losses`` or ``gradients``.
        """
        if quantity == "gradients":
            yield from _gradient_errors(self.gradients, reference.gradients)
            return
        pairs = zip(getattr(self, quantity), getattr(reference, quantity), strict=True)
        yield from ((f"sample {k}", relative(found, expected)) for k, (found, expected) in enumerate(pairs))


def relative(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Return the norm of the difference divided by the norm of ``expected``, or by ``scale``."""
    size = float(expected.double().norm()) if scale is None else scale
    return float((found.double() - expected.double()).norm()) / max(size, 1e-30)


def _gradient_errors(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> Iterator[tuple[str, float]]:
    """Yield the errors of gradients; one that should be zero is compared with the largest of the other samples."""
    for part in expected[0]:
        sizes = [float(gradients[part].double().norm()) for gradients in expected]
        largest = max(sizes)
        if largest == 0.0:
            continue
        for k, size in enumerate(sizes):
            scale = size if size > TINY * largest else largest
            yield f"{part} of sample {k}", relative(found[k][part], expected[k][part], scale)


def measured(
    model: nn.Module, rows: Sequence[dict[str, Any]], *, autocast: Any, device: torch.device, share: Share
) -> Measured:
    """Run each row forward, and the loss of each of its samples backward separately.

    Args:
        rows: batches of the collator with ``labels``, and ``counts``, the supervised tokens of each sample.
        autocast: function that returns the context manager of a forward pass.
    """
    found = Measured()
    model.train()
    for row in rows:
        inputs, targets, counts = prepared(row, device)
        begins = [sum(counts[:k]) for k in range(len(counts))]
        for k, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            model.zero_grad(set_to_none=True)
            with autocast():
                logits = model(**inputs).logits[0]  # [K of all samples, V]
            if k == 0:
                found.logits += [part.float().cpu() for part in logits.detach().split(counts)]
                losses = F.cross_entropy(logits.detach().float(), targets, reduction="none")
                found.losses += [part.cpu() for part in losses.split(counts)]
            cut = slice(begin, begin + count)
            scale = HALF_SCALE if logits.dtype == torch.float16 else 1.0
            (F.cross_entropy(logits[cut].float(), targets[cut], reduction="sum") * scale).backward()
            found.gradients.append(share.taken(model, scale))
            del logits
    model.zero_grad(set_to_none=True)
    return found


def seen_logits(
    model: nn.Module, rows: Sequence[dict[str, Any]], *, autocast: Any, device: torch.device
) -> list[Tensor]:
    """Return the logits float32[K, V] of each sample of the rows, in evaluation mode."""
    found: list[Tensor] = []
    model.eval()
    with torch.no_grad(), autocast():
        for row in rows:
            inputs, _, counts = prepared(row, device)
            found += [part.float().cpu() for part in model(**inputs).logits[0].split(counts)]
    return found


def prepared(row: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor, list[int]]:
    """Return the model's keyword arguments for a flat row, the target tokens, and their count per sample."""
    labels = row["labels"][0]
    places = (labels != IGNORE).nonzero(as_tuple=True)[0]
    inputs = {key: value for key, value in row.items() if key not in (*ASIDE, "counts")}
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs | {"logits_to_keep": (places - 1).to(device)}, labels[places].to(device), row["counts"]


def alone_rows(subject: Subject) -> list[dict[str, Any]]:
    """Return a row for each sample, without the filler media and media positions that training adds."""
    return [with_counts(QwenVLCollator()([sample]), [sample]) for sample in subject.samples]


def with_counts(row: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """Add ``counts``, the number of supervised tokens of each sample, to a row."""
    return row | {"counts": [int((sample["labels"] != IGNORE).sum()) for sample in samples]}
