"""Calls the hooks of tuning methods that act during training, such as AdaLoRA."""

from typing import Any

from transformers import TrainerCallback

from qwenvl_ft.tuning.methods.trained import TrainedPeftModel


class TuningMethodCallback(TrainerCallback):
    """Calls a `TrainedPeftModel` at the beginning of a run and after each optimizer step; the trainer adds it."""

    def __init__(self, model: TrainedPeftModel) -> None:
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):  # skipped in float16 on an overflow
            self.model.after_step(state.global_step + 1)
