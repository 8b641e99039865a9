"""Tells a method that takes part in training when a run begins and when the optimizer has made a step."""

from typing import Any

from transformers import TrainerCallback

from qwenvl_ft.tuning.methods.trained import TrainedPeftModel


class MethodCallback(TrainerCallback):
    """Added by the trainer for a `TrainedPeftModel`; with accumulation a step is the optimizer's, not a pass."""

    def __init__(self, model: TrainedPeftModel) -> None:
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):  # float16: an overflow
            self.model.after_step(state.global_step + 1)
