"""Ctrl-C and SIGTERM: finish the step, save a checkpoint and stop; a second signal stops at once."""

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalCallback(TrainerCallback):
    """Saves a checkpoint at the end of the step in which the first signal arrives, and ends the run.

    Several ranks agree after every step by an all-reduce of one number between CPUs, so all save the same step even if
    the signal reached one rank only, or several in different steps. The checkpoint can be resumed whatever else the
    recipe saves, is written before any evaluation, and is never rotated away.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the signal that reached this rank."""
        self.stopping: int | None = None
        """Number of the signal that all ranks stop for, agreed at the end of a step."""
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._process = os.getpid()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._group is not None:
            number = torch.tensor([self.received or 0])
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
            self.stopping = int(number) or None
        else:
            self.stopping = self.received
        if self.stopping is not None:
            args.save_only_model = False
            control.should_save = True
            control.should_evaluate = False  # with save_strategy=best it would decide whether to save
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Once the checkpoint is written, neither evaluate nor load the best one, which would delete it."""
        if self.stopping is not None:
            control.should_save = control.should_evaluate = False
            state.best_model_checkpoint = None
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a dataloader worker inherits the handler; Ctrl-C reaches it too, and the last step needs it
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        print(f"{name}: saving a checkpoint after this step; a second signal stops at once.", flush=True)
