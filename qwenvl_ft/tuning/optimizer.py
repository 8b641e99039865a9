"""Builds parameter groups by part, the optimizer, and schedules that end at the same learning rate for every group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import PARTS, part_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

NO_DECAY_ENDINGS = ("bias",)
NO_DECAY_MARKS = (
    *("lora_magnitude_vector.", ".boft_s.", ".ia3_l.", ".road_alpha.", ".vector_a", ".vector_b"),
    *(".reft_W.", ".reft_bias."),
)
"""Parts of names of adapter weights that must not decay, because zero is not the base model: scales, edit targets."""
LORA_B = (".lora_B.", ".lora_embedding_B.")
"""Parts of names of LoRA's matrices that start at zero."""
LORAPLUS_RATIO = 16.0
"""Default ratio of LoRA+ (Hayou and others 2024, arXiv 2402.12354)."""
PROJECTORS = (
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("apollo_torch.random_projector", "GradientProjector"),
    ("apollo_torch.svd_projector", "GaLoreProjector"),
)
"""(module, class) of the projectors that GaLore and APOLLO keep in their optimizer state."""


def part_rates(learning_rate: float, vit_lr: float | None, aligner_lr: float | None) -> dict[str, float]:
    """Return part -> learning rate; a rate that is None is ``learning_rate``."""
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
    lora_plus: float | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters in one group for each part, with and without weight decay; no group is empty.

    Biases and normalisation layers do not decay, nor do scales of an adapter (DoRA's magnitudes, IA3's factors). The
    matrices of an adapter decay like weights, which pulls it towards the base model. The model may be bare, a PeftModel
    (with copies of ``modules_to_save``), or wrapped by DDP or FSDP.

    Args:
        lora_plus: ratio of the learning rate of LoRA's B matrices to that of their part, for LoRA+; they are then in
            groups of their own, ``vision/lora_B``, ... None is plain LoRA.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``: ``vision/decay``, ``vision/no_decay``, ...

    Raises:
        RecipeError: no parameter is trainable, or ``lora_plus`` without LoRA.
    """
    rates = part_rates(learning_rate, vit_lr, aligner_lr)
    norms = _norm_parameters(model)
    kinds = {"decay": (weight_decay, 1.0), "no_decay": (0.0, 1.0)}
    if lora_plus is not None:
        kinds["lora_B"] = (weight_decay, lora_plus)
    groups: dict[str, dict[str, Any]] = {
        f"{part}/{kind}": {
            "params": [],
            "lr": rates[part] * ratio,
            "weight_decay": decay,
            "name": f"{part}/{kind}",
        }
        for part in PARTS
        for kind, (decay, ratio) in kinds.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[f"{part_of(name)}/{_kind_of(name, norms, kinds)}"]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise RecipeError("nothing is left to train: no parameter requires a gradient. Unfreeze a part of the model.")
    if lora_plus is not None and not any(group["name"].endswith("/lora_B") for group in filled):
        raise RecipeError(
            "training.lorap_lr_ratio applies to LoRA's B matrices, but the model has no trainable ones. Remove it, or "
            "set tuner.train_type=lora."
        )
    _check_each_once(model, filled)
    return filled


def build_optimizer(
    cls: type[Optimizer], options: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module
) -> Optimizer:
    """Build the optimizer that transformers chose, with the groups of `param_groups`.

    For GaLore and APOLLO, transformers passes groups that select the weights whose gradients are projected, and the
    settings of the projection. Those weights are moved to groups ``llm/projected``, ... at the rate of their part.

    Args:
        cls: from ``Trainer.get_optimizer_cls_and_kwargs``.
        options: from the same method.

    Raises:
        RecipeError: none of the weights to project is trainable.
    """
    options = dict(options)
    if "params" in options:
        groups = _projected(groups, options.pop("params"))
        _let_projections_load(cls)
    if "warmup_steps" in options:
        options["warmup_steps"] = 0  # schedule-free optimizers: our schedule warms up, for all groups and on resume
    optimizer = cls(groups, **options)
    _check_each_once(model, optimizer.param_groups)
    return optimizer


def logged_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rates to log: ``llm``, ``vision``, ..., and ``llm/lora_B`` if it has its own."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        part, _, kind = group["name"].partition("/")
        rates[group["name"] if kind == "lora_B" else part] = float(group["lr"])
    return rates


def schedule_with_floor(
    kind: str, optimizer: Optimizer, *, warmup_steps: int, total_steps: int, min_lr: float, **options: Any
) -> LambdaLR:
    """Build one of ``MIN_LR_SCHEDULES`` that ends at ``min_lr`` for every group.

    transformers converts ``min_lr`` to a share of the optimizer's default rate, so a group with a different rate would
    end at a different minimum. This schedule lets each group follow transformers' schedule for an optimizer whose
    default is the group's rate. A group whose rate is ``min_lr`` or less keeps its rate after the warmup.

    Example:
        cosine_warmup_with_min_lr, rate 1e-4, 1,000 steps, 100 warmup steps, ``min_lr`` 1e-6: the rate is 1e-6 at step
        0, 1e-4 at step 99, and 1e-6 at step 999.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    lambdas: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        peak = float(group["initial_lr"] if "initial_lr" in group else group["lr"])
        single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak or 1.0)
        settings = {"min_lr": min(min_lr, peak or 1.0)} | options
        schedule: Any = get_scheduler(kind, single, warmup_steps, total_steps, scheduler_specific_kwargs=settings)
        lambdas.append(partial(_held, factor=schedule.lr_lambdas[0], last=max(total_steps - 1, 0)))
    return LambdaLR(optimizer, lambdas)


def _held(step: int, *, factor: Callable[[int], float], last: int) -> float:
    """Return a schedule's factor, constant after the last step; transformers' would rise again."""
    return factor(min(step, last))


def _kind_of(name: str, norms: set[str], kinds: dict[str, Any]) -> str:
    if "lora_B" in kinds and any(mark in name for mark in LORA_B):
        return "lora_B"
    exempt = name in norms or name.endswith(NO_DECAY_ENDINGS) or any(mark in name for mark in NO_DECAY_MARKS)
    return "no_decay" if exempt else "decay"


def _projected(groups: list[dict[str, Any]], selected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split off from ``groups`` the parameters for which ``selected`` sets a projection rank."""
    projections = {
        id(p): {k: v for k, v in group.items() if k != "params"} for group in selected for p in group["params"]
    }
    split: list[dict[str, Any]] = []
    for group in groups:
        chosen = [p for p in group["params"] if "rank" in projections[id(p)]]
        rest = [p for p in group["params"] if "rank" not in projections[id(p)]]
        if rest:
            split.append(group | {"params": rest})
        if chosen:
            part = group["name"].partition("/")[0]
            split.append(group | {"params": chosen, "name": f"{part}/projected"} | projections[id(chosen[0])])
    if not any("rank" in group for group in split):
        raise RecipeError(
            "the optimizer projects gradients of Linear layers, but none of those named in training."
            "galore_target_modules or optim_target_modules is trainable. Name others, or use another optimizer."
        )
    return split


def _norm_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of normalisation layers, which are found by their class name."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }


def _let_projections_load(cls: type[Optimizer]) -> None:
    """Allow ``torch.load`` to read the projectors in the optimizer state of GaLore and APOLLO from a checkpoint."""
    import torch

    for module, name in PROJECTORS:
        if module.partition(".")[0] == cls.__module__.partition(".")[0]:
            torch.serialization.add_safe_globals([getattr(import_module(module), name)])


def _check_each_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    # Runs once at the start: a parameter in no group would silently not train.
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == wanted, f"{len(wanted ^ set(grouped))} parameters are in no group"
