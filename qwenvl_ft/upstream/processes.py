"""Resets accelerate's process-wide settings, which outlive an Accelerator.

Relies on ``AcceleratorState._reset_state``, accelerate 1.0 to 1.15. Without a reset, a second run in the same process
keeps the precision and the DeepSpeed or FSDP settings of the first, or rejects other ones. If it is missing, several
phases in one process are refused.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import installed, lacks


def forget_precision() -> None:
    """Reset accelerate's settings for the next Accelerator of this process; the process group is kept.

    Raises:
        RecipeError: this accelerate cannot do so.
    """
    if reason := lacks(AcceleratorState, ("_reset_state",)):
        raise RecipeError(
            f"phases: {installed(('accelerate',))} {reason}, so one process cannot train twice. Run each phase as "
            "a recipe of its own."
        )
    AcceleratorState._reset_state()
