"""Adds hooks to steps of transformers' training loop that have no public hook.

Relies on private methods of `transformers.Trainer` (`OVERRIDDEN` and `USED`), which have the same names and parameters
in transformers 5.5 to 5.24; `PlannedTrainer` overrides the former and calls the latter. It also reads
``_train_batch_size`` and sets ``_created_lr_scheduler``. Each override calls a hook, whose name states its purpose, and
the method that it overrides.

A release that renamed one of these methods would not call the override, and would silently train on other rows than
planned. There is no fallback, so `LOOP` is checked before a trainer is built, and refuses in one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream import launcher
from qwenvl_ft.upstream.probe import Feature, takes

from transformers import Trainer  # isort: skip
from transformers.trainer_utils import TrainOutput  # isort: skip

COMPILING = "torch_compile", "torch_compile_backend", "torch_compile_mode"
"""Fields of TrainingArguments by which accelerate compiles the whole model."""
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
}
"""Private method of Trainer -> its parameters, which Trainer passes by name or in this order."""
USED: dict[str, tuple[str, ...]] = {
    "_evaluate": ("trial", "ignore_keys_for_eval"),
    "_determine_best_metric": ("metrics", "trial"),
}
"""Private method of Trainer that is called but not overridden -> its parameters."""
CALLED: dict[str, tuple[str, ...]] = {
    "get_train_dataloader": (),
    "get_eval_dataloader": ("eval_dataset",),
    "num_examples": ("dataloader",),
    "set_initial_training_values": ("args", "dataloader"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "floating_point_ops": ("inputs",),
    "create_optimizer": ("model",),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    "log": ("logs", "start_time"),
    "save_model": ("output_dir",),
}
"""Public method of Trainer that our subclass overrides -> its parameters. If one were removed, ours would not run."""


@dataclass(frozen=True)
class EpochLength:
    """The length of an epoch."""

    passes: int
    """Micro-batches of this rank."""
    steps: int
    """Optimizer steps."""


class PlannedTrainer(Trainer):
    """transformers' Trainer with the hooks that a plan of rows needs, for a subclass to implement.

    Raises:
        RecipeError: this transformers has another training loop.
    """

    def __init__(self, model: Any, args: Any, **options: Any) -> None:
        if reason := LOOP.missing():
            raise RecipeError(f"{LOOP.name} does not work: transformers {reason}. {LOOP.instead}")
        with _without_compiling(args):
            super().__init__(model, args, **options)
        if args.fsdp and not self.is_fsdp_enabled:
            raise RecipeError(
                f"training.fsdp: accelerate does not shard on {args.device.type} devices and would train by DDP. "
                "Remove the key."
            )
        # transformers 5.5.0 lets accelerate divide the loss by the accumulation steps once more, after the loop has
        # done so. Later releases set 1 themselves.
        self.accelerator.gradient_accumulation_steps = 1
        self.is_prepared = False

    # -- hooks -----------------------------------------------------------------------------------------------------

    def before_wrapping(self) -> None:
        """Called when training begins: checkpointing is on, the model is not yet wrapped, no optimizer exists."""

    def resume_at(self, step: int) -> tuple[int, int]:
        """Return for an optimizer step the finished epochs, and the finished micro-batches of the next epoch."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> EpochLength | None:
        """Called when an epoch begins; returns its length, or None if nothing is left to train."""
        raise NotImplementedError

    def end_epoch(self, epoch: int) -> None:
        """Called when an epoch is over."""

    def saving(self) -> AbstractContextManager[None]:
        """Return a context that is entered before a checkpoint is written and left when its files are written.

        Older checkpoints are not deleted in it: ``save_total_limit`` is left to the hook.
        """
        return nullcontext()

    def save_beside_optimizer(self, folder: str) -> None:
        """Called after the optimizer's state is saved in a checkpoint, to save what else a resumed run needs.

        The random states follow and, last, the trainer's own state.
        """

    @property
    def rows_per_pass(self) -> int:
        """``per_device_train_batch_size``, or the size that ``auto_find_batch_size`` has found."""
        return int(self._train_batch_size)

    def use_scheduler(self, scheduler: Any) -> None:
        """Train with the given schedule. A second call of `train` makes a new one, as with transformers' own."""
        self.lr_scheduler = scheduler
        self._created_lr_scheduler = True

    def save_now(self) -> None:
        """Write a checkpoint of the last finished step that can be resumed, whatever else the run saves."""
        self.args.save_only_model = False
        self._save_checkpoint(cast(nn.Module, self.model), None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def end_early(self) -> TrainOutput:
        """End the training before its last step, from outside of the loop."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    def evaluate_step(self, checkpoint: str) -> None:
        """Evaluate after training has begun, as the loop does at the end of a step.

        Args:
            checkpoint: folder of the step's checkpoint, which becomes the best one if the metric says so.
        """
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics=metrics, trial=None):
            self.state.best_model_checkpoint = checkpoint

    # -- overrides that call the hooks -----------------------------------------------------------------------------

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        self.before_wrapping()
        self.is_prepared = True
        return super()._prepare_for_training(*arguments, **options)

    def _init_training_state(self, *arguments: Any, **options: Any) -> tuple[int, int]:
        super()._init_training_state(*arguments, **options)
        return self.resume_at(self.state.global_step)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        options |= dict(zip(OVERRIDDEN["_run_epoch"], arguments, strict=False))
        length = None if self.control.should_training_stop else self.begin_epoch(options["epoch"])
        if length is None:
            self.control.should_training_stop = True
            return
        options["steps_in_epoch"], options["num_update_steps_per_epoch"] = length.passes, length.steps
        super()._run_epoch(**options)
        self.end_epoch(options["epoch"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.saving(), _without_rotation(self.args):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.save_beside_optimizer(output_dir)


@contextmanager
def _without_rotation(args: Any) -> Iterator[None]:
    """Keep transformers from deleting older checkpoints before the new one is complete."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


@contextmanager
def _without_compiling(args: Any) -> Iterator[None]:
    """Hide ``torch_compile`` from accelerate, which would wrap the model and change the names of its weights.

    The launcher, and TrainingArguments of some versions, also set environment variables, which accelerate reads; they
    are hidden too.
    """
    kept = {name: getattr(args, name) for name in COMPILING}
    for name, value in zip(COMPILING, (False, None, None), strict=True):
        setattr(args, name, value)
    try:
        with launcher.compiling_as_launched():
            for name in launcher.COMPILING:
                os.environ.pop(name, None)
            yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


@cache
def _other_loop() -> str:
    for name, parameters in (OVERRIDDEN | USED | CALLED).items():
        method = getattr(Trainer, name, None)
        if method is None:
            return f"has no Trainer.{name}"
        if reason := takes(method, *parameters):
            return reason
    return ""


LOOP = Feature(
    name="training on planned rows",
    missing=_other_loop,
    instead="Install a transformers that docs/compatibility.md lists.",
)
FEATURES = (LOOP,)
