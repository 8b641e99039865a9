"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop, and say how to go on."""

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalCallback(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the running step; a second one ends the process at once.

    Where several processes train, they agree after every step (one number, between CPUs): all save the same step,
    even if the signal reached only one of them or reached them in different steps. The checkpoint can be resumed
    whatever the recipe saves otherwise, is written before anything is evaluated, and is never rotated away.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Signal that reached this process."""
        self.stopping: int | None = None
        """Signal that all processes stop for, agreed at the end of a step."""
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
            control.should_evaluate = False  # save_strategy=best would save only if the evaluation is the best so far
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """The checkpoint is written: neither evaluate what is not finished, nor go back to the best and delete it."""
        if self.stopping is not None:
            control.should_save = control.should_evaluate = False
            state.best_model_checkpoint = None
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker, which inherits the handler: Ctrl-C reaches it too, and the run still needs it
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        print(f"{name}: a checkpoint is saved after this step; once more ends the process at once.", flush=True)
