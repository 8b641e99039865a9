"""Schedules that end at ``lr_scheduler_kwargs.min_lr``, for parts that have learning rates of their own."""

from typing import Any, cast

from transformers import TrainingArguments

from qwenvl_ft.recipe.schema import MIN_LR_SCHEDULES
from qwenvl_ft.tuning.optimizer import schedule_with_floor


def floor_schedule(args: TrainingArguments, optimizer: Any, steps: int) -> Any:
    """Return the schedule of a run of ``steps`` optimizer steps; None if it has no ``min_lr``."""
    kwargs = dict(cast(dict[str, Any], args.lr_scheduler_kwargs or {}))
    if args.lr_scheduler_type not in MIN_LR_SCHEDULES or "min_lr" not in kwargs:
        return None
    return schedule_with_floor(
        args.lr_scheduler_type,
        optimizer,
        warmup_steps=args.get_warmup_steps(steps),
        total_steps=steps,
        min_lr=float(kwargs.pop("min_lr")),
        **kwargs,
    )
