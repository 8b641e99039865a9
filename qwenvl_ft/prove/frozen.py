"""Checks that a few training steps change the trained weights and no bit of a frozen one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.prove.measure import alone_rows, relative, seen_logits
from qwenvl_ft.prove.subject import Subject, run_to_end
from qwenvl_ft.prove.table import FAILED, OK, Row

CHANGE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Smallest relative change of the logits that is clearly due to training and not to rounding."""
ATTEMPTS, FASTER = 4, 10.0
"""Maximum number of training rounds until that change, and the factor on the learning rate between rounds."""


class Frozen:
    """The check ``frozen``. The other checks use the model that it trains."""

    name = "frozen"

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.moved: set[str] = set()
        self.parts: dict[str, list[str]] = {}
        self.watch = Watch()

    def measure(self, subject: Subject) -> None:
        model = subject.model
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = digests(model)
        train(subject, self.watch)
        after = digests(model)
        self.moved = {name for name, digest in after.items() if digest != before[name]}
        for name in after:
            self.parts.setdefault(part_of(name), []).append(name)

    def rows(self, subject: Subject) -> Iterator[Row]:
        for part, names in self.parts.items():
            frozen = [name for name in names if name not in self.trained]
            if frozen:
                changed = [name for name in frozen if name in self.moved]
                yield Row(
                    check="frozen bits",
                    compared=f"{part}: frozen weights before and after {subject.options.steps} steps, every bit",
                    figure=f"{len(changed)} of {len(frozen)} moved",
                    tolerance="0",
                    verdict=FAILED if changed else OK,
                    note=f"the first that moved: {changed[0]}" if changed else "",
                )
        for part, names in self.parts.items():
            yield from self._trained(part, [name for name in names if name in self.trained])

    def _trained(self, part: str, names: list[str]) -> Iterator[Row]:
        """Yield a row: a weight without gradient may stay the same (an unused expert's), but not all weights of a
        part."""
        if not names:
            return
        stuck = [name for name in names if name not in self.moved]
        wrong = [name for name in stuck if name in self.watch.reached]
        note = ""
        if len(stuck) == len(names):
            note = "no gradient reached it: does no sample need it?" if not wrong else "gradients, but no change"
        elif wrong:
            note = f"{len(wrong)} had a gradient and did not move, the first is {wrong[0]}"
        elif stuck:
            note = f"{len(stuck)} had no gradient in these steps, the first is {stuck[0]}"
        yield Row(
            check="trained weights",
            compared=f"{part}: weights that train, before and after",
            figure=f"{len(names) - len(stuck)} of {len(names)} moved",
            tolerance="all with a gradient",
            verdict=FAILED if wrong or len(stuck) == len(names) else OK,
            note=note,
        )


def train(subject: Subject, watch: TrainerCallback) -> None:
    """Train ``steps`` steps, and again at ten times the learning rate as long as the logits hardly change.

    A saved model can be distinguished from the base model only if training changed more than rounding does.
    """
    context: dict[str, Any] = {"autocast": subject.autocast, "device": subject.device}
    rows, steps = alone_rows(subject), subject.options.steps
    subject.before = seen_logits(subject.model, rows, **context)
    stages = []
    for attempt in range(ATTEMPTS):
        if attempt:
            subject.train_faster(FASTER**attempt)
        rate = subject.trainer.args.learning_rate
        subject.say(f"training {steps} steps of {subject.recipe.tuner.train_type} at {rate:.1g}")
        stages.append(f"{steps} at {rate:.1g}")
        subject.trainer.add_callback(watch)
        run_to_end(subject.trainer)
        subject.after = seen_logits(subject.model, rows, **context)
        change = max(relative(*pair) for pair in zip(subject.after, subject.before, strict=True))
        if change >= CHANGE[subject.dtype]:
            break
    subject.facts["training"] = f"steps at the rate: {', then '.join(stages)}; logits changed by {change:.1e}"


class Watch(TrainerCallback):
    """Records the names of weights that had a nonzero gradient in any step."""

    def __init__(self) -> None:
        self.reached: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if name not in self.reached and parameter.grad is not None and bool(parameter.grad.any()):
                self.reached.add(name)


def digests(model: nn.Module) -> dict[str, bytes]:
    """Hash the bytes of each parameter: name -> digest."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        named = list(model.named_parameters())
        return dict(zip((name for name, _ in named), pool.map(_digest, (value for _, value in named)), strict=True))


def _digest(value: Tensor) -> bytes:
    flat = value.detach().contiguous().flatten()
    return hashlib.blake2b(flat.view(torch.uint8).cpu().numpy().data, digest_size=16).digest()
