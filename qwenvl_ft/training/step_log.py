"""The figures that a log line adds to transformers' own: learning rates, gradient norms and throughput."""

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from qwenvl_ft.training.gradients import PartGradients
from qwenvl_ft.training.meter import Meter
from qwenvl_ft.tuning.optimizer import logged_rates


class PartRates(TrainerCallback):
    """Keeps the learning rates of the last step, by part of the model."""

    def __init__(self) -> None:
        self.by_part: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Read the rates before the schedule advances."""
        self.by_part = logged_rates(optimizer)

    def of_llm(self, default: float) -> float:
        """Return the language model's rate, or the first group's if it is frozen."""
        return self.by_part["llm"] if "llm" in self.by_part else next(iter(self.by_part.values()), default)


class StepLog:
    """Collects the figures of steps through callbacks.

    Args:
        args: TrainingArguments of the run.
        zero_gradient_steps: see `PartGradients`.
        has_media: True if any training sample has an image or a video.
    """

    def __init__(self, args: TrainingArguments, zero_gradient_steps: int, *, has_media: bool) -> None:
        self.meter = Meter(args)
        self.rates = PartRates()
        self.gradients = PartGradients(zero_gradient_steps, has_media=has_media)

    def callbacks(self, *, deepspeed: bool) -> list[TrainerCallback]:
        """Return the callbacks to add to the trainer; DeepSpeed does not expose gradients."""
        return [self.meter, self.rates] if deepspeed else [self.meter, self.rates, self.gradients]

    def read(self, logs: dict[str, float], state: Any) -> dict[str, float]:
        """Return the figures since the last log line; waits for the device.

        Args:
            logs: transformers' own figures; ``learning_rate`` is that of its first parameter group.
            state: the trainer's state.
        """
        figures = {f"lr/{part}": rate for part, rate in self.rates.by_part.items()}
        if "learning_rate" in logs:
            figures = {"learning_rate": self.rates.of_llm(logs["learning_rate"])} | figures
        figures |= self.gradients.read(logs.get("grad_norm"))
        return figures | self.meter.read(state)
