"""Resets settings of accelerate and torch.compile that belong to the process and outlive a run.

Relies on ``AcceleratorState._reset_state`` and on ``_shared_state``, the dict behind each of accelerate's three states,
accelerate 1.0 to 1.15. Without a reset, a second run in the same process keeps the precision and the DeepSpeed or FSDP
settings of the first, or rejects other ones. If ``_reset_state`` is missing, several phases in one process are refused;
without ``_shared_state`` a run leaves its state behind, and FSDP on CPUs is refused. Also relies on
``torch._dynamo.config.recompile_limit``, torch 2.7 to 2.15, which `qwenvl_ft.upstream.layers` raises; if it is missing,
``torch_compile`` is refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import installed, lacks

SHARED = "_shared_state"


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


def accelerate_restorer() -> Callable[[], None]:
    """Return a function that sets accelerate's three states back to what they are now."""
    kinds: list[Any] = [kind for kind in (PartialState, AcceleratorState, GradientState) if not lacks(kind, (SHARED,))]
    before = [dict(getattr(kind, SHARED)) for kind in kinds]

    def restore() -> None:
        for kind, values in zip(kinds, before, strict=True):
            state = getattr(kind, SHARED)
            state.clear()
            state.update(values)

    return restore


def shard_on_cpu() -> None:
    """Make accelerate shard by FSDP on CPUs too; it would ignore FSDP there and train by DDP, without a word.

    Up to 1.15 it takes the FSDP plugin into account only for other kinds of devices. So the ranks of this process are
    said to be of such a kind; once the Accelerator exists, they are ``FSDP`` in any case.

    Raises:
        RecipeError: this accelerate keeps its state elsewhere.
    """
    if reason := lacks(PartialState, (SHARED,)):
        raise RecipeError(
            f"training.fsdp: {installed(('accelerate',))} {reason}, so FSDP cannot run on CPUs. Remove it, or train on "
            "GPUs."
        )
    state = getattr(PartialState, SHARED)
    if state.get("distributed_type") == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_GPU


def recompile_limit() -> int | None:
    """Return how often torch recompiles a function before it gives up; None if this torch has no such setting."""
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    return int(config.recompile_limit) if hasattr(config, "recompile_limit") else None


def set_recompile_limit(times: int | None) -> None:
    """Set what `recompile_limit` returns."""
    if times is not None:
        config: Any = torch._dynamo.config  # type: ignore[attr-defined]
        config.recompile_limit = times
