"""Ctrl-C and SIGTERM: save a checkpoint and stop, after the step, or between two batches of an evaluation."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qwenvl_ft.training.agreement import Agreement

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 2.0
"""Seconds in which a further signal is the same one: a terminal or a cluster signals the launcher and the processes,
and the launcher passes it on."""


class Interrupted(Exception):
    """An evaluation was left because of a signal; raised on all ranks between the same two batches."""


class SignalCallback(TrainerCallback):
    """Saves a checkpoint as soon as the first signal arrives, and ends the run.

    In training this is at the end of the step. An evaluation is left between two batches (`check`), and a generated
    answer between two tokens. Several ranks agree at each of these places, so all save the same step even if the signal
    reached one rank only, or several in different steps. The checkpoint can be resumed whatever else the recipe saves,
    is written before any evaluation, and is never rotated away.

    A second signal ends the process at once. While a checkpoint is being written it only says so, and a third one ends
    the process.
    """

    def __init__(self, ranks: Agreement) -> None:
        self.received: int | None = None
        """Number of the signal that reached this rank."""
        self.stopping: int | None = None
        """Number of the signal that all ranks stop for."""
        self._ranks = ranks
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._at = 0.0
        self._writing = self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._previous:  # auto_find_batch_size begins several times
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.agreed() and state.global_step < state.max_steps:
            args.save_only_model = False
            control.should_save = True
            control.should_evaluate = False  # with save_strategy=best it would decide whether to save
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Once the checkpoint is written, neither evaluate nor load the best one, which would delete it."""
        if self.stopping is not None and state.global_step < state.max_steps:
            control.should_save = control.should_evaluate = False
            state.best_model_checkpoint = None
        return control

    def agreed(self) -> bool:
        """Return True if a signal has reached any rank; every rank must call it."""
        self.stopping = self._ranks.largest(self.received or 0) or None
        return self.stopping is not None

    def check(self) -> None:
        """Raise Interrupted on every rank if a signal has reached any; every rank must call it."""
        if self.agreed():
            raise Interrupted

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let a second signal wait inside the context, in which a checkpoint is written."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = self._warned = False

    def restore(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a dataloader worker inherits the handler; Ctrl-C reaches it too, and the last step needs it
        name, now = signal.Signals(number).name, time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
            _say(f"{name}: saving what is finished, then stopping; a second signal stops at once.")
        elif now - self._at < SAME:
            return
        elif self._writing and not self._warned:
            self._warned, self._at = True, now
            _say(f"{name}: a checkpoint is being written; one more signal stops at once and leaves it incomplete.")
        else:
            os._exit(128 + number)


def _say(line: str) -> None:
    """Print from a signal handler, which may have interrupted another print."""
    try:
        print(line, flush=True)
    except RuntimeError:  # reentrant call
        os.write(1, f"{line}\n".encode())
