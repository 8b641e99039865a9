"""Borrowed: accelerate's memory of how the process computes, which outlives its Accelerator.

``AcceleratorState._reset_state``, accelerate 1.0 to 1.15: without it a second run of the same process keeps the
precision and the DeepSpeed or FSDP settings of the first, or refuses others. Where it is missing, phases that follow
one another in a process are refused.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import installed, lacks


def forget_precision() -> None:
    """Let the next Accelerator of this process have settings of its own; the process group stays.

    Raises:
        RecipeError: this accelerate has no way to.
    """
    if reason := lacks(AcceleratorState, ("_reset_state",)):
        raise RecipeError(
            f"phases: {installed(('accelerate',))} {reason}, so that one process cannot train twice. Run each phase as "
            "a recipe of its own."
        )
    AcceleratorState._reset_state()
