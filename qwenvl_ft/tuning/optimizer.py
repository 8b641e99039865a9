"""Parameter groups of the multimodal optimizer, and a schedule whose floor is the same rate for every group."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import PARTS, part_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

NO_DECAY_ENDINGS = ("bias",)
NO_DECAY_MARKS = ("lora_magnitude_vector",)
"""Names of parameters that weight decay leaves alone, besides all of a normalisation layer."""


def part_rates(learning_rate: float, vit_lr: float | None, aligner_lr: float | None) -> dict[str, float]:
    """Part -> learning rate; one that is not given is ``learning_rate``."""
    return {
        "vision": learning_rate if vit_lr is None else vit_lr,
        "merger": learning_rate if aligner_lr is None else aligner_lr,
        "llm": learning_rate,
    }


def param_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    vit_lr: float | None = None,
    aligner_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """One group for each part and for decay or none, of the parameters that train; empty groups are left out.

    Biases and normalisation layers do not decay; LoRA's matrices decay like weights. Works on the bare model, inside
    a PeftModel (copies of ``modules_to_save`` included) and inside DDP or FSDP.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``: ``vision/decay``, ``vision/no_decay``, ...

    Raises:
        RecipeError: nothing trains.
    """
    rates = part_rates(learning_rate, vit_lr, aligner_lr)
    norms = _norm_parameters(model)
    groups: dict[str, dict[str, Any]] = {
        f"{part}/{kind}": {"params": [], "lr": rates[part], "weight_decay": decay, "name": f"{part}/{kind}"}
        for part in PARTS
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name in norms or name.endswith(NO_DECAY_ENDINGS) or any(mark in name for mark in NO_DECAY_MARKS)
            groups[f"{part_of(name)}/{'no_decay' if exempt else 'decay'}"]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise RecipeError("nothing is left to train: no parameter requires a gradient. Unfreeze a part of the model.")
    _check_each_once(model, filled)
    return filled


def cosine_warmup_with_min_lr(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, min_lr: float) -> LambdaLR:
    """Linear warmup, then half a cosine down to ``min_lr``: the same floor for every group.

    transformers' schedule of this name takes ``min_lr`` as a share of the optimizer's default rate, so a group with
    another rate ends at another floor. For a group with that rate the two are equal at every step. A group whose rate
    is ``min_lr`` or less keeps it after the warmup.

    Example:
        Rate 1e-4, 1,000 steps, 100 of warmup, ``min_lr`` 1e-6: step 0 has 1e-6, step 99 1e-4, step 999 1e-6.
    """
    from torch.optim.lr_scheduler import LambdaLR

    lambdas: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        peak = float(group["initial_lr"] if "initial_lr" in group else group["lr"])
        floor = min(1.0, min_lr / peak) if peak > 0 else 1.0
        lambdas.append(partial(_share_of_peak, warmup_steps=warmup_steps, total_steps=total_steps, floor=floor))
    return LambdaLR(optimizer, lambdas)


def _share_of_peak(step: int, *, warmup_steps: int, total_steps: int, floor: float) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that a normalisation layer holds itself: told by its class, so that none is missed."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }


def _check_each_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == wanted, f"{len(wanted ^ set(grouped))} parameters are in no group"
