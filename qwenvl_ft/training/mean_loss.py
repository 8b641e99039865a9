"""What ``loss`` of a log line and ``train_loss`` are: the mean over the supervised tokens of all their steps and ranks.

transformers logs the mean of the steps' means, in which a step with few supervised tokens counts as much as one with
many, and its ``train_loss`` counts only one rank's share of the steps after the last log line.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from qwenvl_ft.training.ranks import sum_over_ranks

SAVED_AS = "MeanLoss"
"""Key of the sums in ``TrainerState.stateful_callbacks``, which every checkpoint holds in trainer_state.json."""


class MeanLoss(TrainerCallback):
    """Sums of losses and of supervised tokens (or of their weights), since the last log line and since step 0.

    Each rank adds up its own on its device, without waiting for it; the ranks are summed where a line is logged or a
    checkpoint is saved. A step that the optimizer skipped trained on nothing, so its losses are left out.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Steps since the last log line that the optimizer skipped: in float16, on an overflow."""
        self._step: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
        """The sums of the current step."""
        self._sum: Tensor | float = 0.0
        self._tokens: Tensor | float = 0.0
        self._since_log = self._run = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin at 0, or at the sums of the checkpoint that is resumed."""
        self._sum = self._tokens = 0.0
        self._step, self.skipped = (0.0, 0.0), 0
        self._since_log = self._run = (0.0, 0.0)
        saved = state.stateful_callbacks.get(SAVED_AS) if state.global_step else None
        if saved is not None:  # else the checkpoint is from a version that did not save them
            self._since_log, self._run = (tuple(saved["attributes"][name]) for name in ("since_log", "run"))

    def add(self, loss_sum: Tensor, tokens: Tensor | int) -> None:
        """Add a micro-batch of this rank.

        Args:
            loss_sum: scalar, the sum of its tokens' losses, each multiplied by its weight.
            tokens: its number of supervised tokens, or the sum of their weights.
        """
        self._step = self._step[0] + loss_sum, self._step[1] + tokens

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Keep the step's losses, or count it as skipped. Every rank skips the same steps."""
        if getattr(optimizer, "step_was_skipped", False):
            self._step = (0.0, 0.0)
            self.skipped += 1
        self._end_step()

    def _end_step(self) -> None:
        self._sum, self._tokens = self._sum + self._step[0], self._tokens + self._step[1]
        self._step = (0.0, 0.0)

    def since_log(self, accelerator: Accelerator) -> dict[str, float]:
        """Return what to log of the steps since the last call; every rank must call it.

        Returns:
            ``loss``, absent if no supervised token was trained on, and ``skipped_steps``, if any.
        """
        self._add_up(accelerator)
        (total, tokens), self._since_log = self._since_log, (0.0, 0.0)
        skipped, self.skipped = self.skipped, 0
        return ({"loss": total / tokens} if tokens else {}) | ({"skipped_steps": skipped} if skipped else {})

    def of_run(self, accelerator: Accelerator) -> float:
        """Return the mean since step 0, also in a resumed run; every rank must call it."""
        self._add_up(accelerator)
        total, tokens = self._run
        return total / tokens if tokens else 0.0

    def save(self, state: Any, accelerator: Accelerator) -> None:
        """Put the sums into the state that a checkpoint will hold; every rank must call it."""
        self._add_up(accelerator)
        sums = {"since_log": list(self._since_log), "run": list(self._run)}
        state.stateful_callbacks[SAVED_AS] = {"args": {}, "attributes": sums}

    def _add_up(self, accelerator: Accelerator) -> None:
        """Move what the ranks have added into the sums; waits for the device."""
        self._end_step()
        own = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in self._new()]
        total, tokens = sum_over_ranks(torch.stack(own), accelerator).tolist()
        self._since_log = self._since_log[0] + total, self._since_log[1] + tokens
        self._run = self._run[0] + total, self._run[1] + tokens

    def _new(self) -> tuple[Tensor | float, Tensor | float]:
        new, self._sum, self._tokens = (self._sum, self._tokens), 0.0, 0.0
        return new
