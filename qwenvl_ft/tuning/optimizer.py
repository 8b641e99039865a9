"""Parameter groups by part, the optimizer over them, and schedules whose floor is the same rate for every group."""

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
"""In the names of an adapter's weights whose zero is not the base model: scales, and targets of an edit."""
LORA_B = (".lora_B.", ".lora_embedding_B.")
"""In the names of LoRA's matrices that start at zero."""
LORAPLUS_RATIO = 16.0
"""Of LoRA+ (Hayou and others 2024, arXiv 2402.12354), where the recipe asks for it and gives none."""
PROJECTORS = (
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("apollo_torch.random_projector", "GradientProjector"),
    ("apollo_torch.svd_projector", "GaLoreProjector"),
)
"""Module and class of what GaLore and APOLLO keep in their state."""


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
    lora_plus: float | None = None,
) -> list[dict[str, Any]]:
    """One group for each part and for decay or none, of the parameters that train; empty groups are left out.

    Biases and normalisation layers do not decay, nor do scales of an adapter (DoRA's magnitudes, IA3's factors); its
    matrices decay like weights, which draws it towards the base model. Works on the bare model, inside
    a PeftModel (copies of ``modules_to_save`` included) and inside DDP or FSDP.

    Args:
        lora_plus: LoRA's B matrices learn at this many times their part's rate, in groups ``vision/lora_B``, ...; None
            is LoRA as it was.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``: ``vision/decay``, ``vision/no_decay``, ...

    Raises:
        RecipeError: nothing trains, or ``lora_plus`` without LoRA.
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
            "training.lorap_lr_ratio is for LoRA's B matrices, and the model has none that train. Remove it, or set "
            "tuner.train_type=lora."
        )
    _check_each_once(model, filled)
    return filled


def build_optimizer(
    cls: type[Optimizer], options: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module
) -> Optimizer:
    """The optimizer that transformers chose, over our groups.

    GaLore and APOLLO come with groups of their own, which say whose gradients are projected, and how; that is carried
    over to groups ``llm/projected``, ... at the rate of their part.

    Args:
        cls: from ``Trainer.get_optimizer_cls_and_kwargs``, as are ``options``.

    Raises:
        RecipeError: a projection of weights none of which trains.
    """
    options = dict(options)
    if "params" in options:
        groups = _projected(groups, options.pop("params"))
        _let_projections_load(cls)
    if "warmup_steps" in options:
        options["warmup_steps"] = 0  # of schedule-free optimizers: the schedule warms up, for all groups and resumes
    optimizer = cls(groups, **options)
    _check_each_once(model, optimizer.param_groups)
    return optimizer


def logged_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates as they are logged: ``llm``, ``vision``, and ``llm/lora_B`` where it has one of its own."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        part, _, kind = group["name"].partition("/")
        rates[group["name"] if kind == "lora_B" else part] = float(group["lr"])
    return rates


def schedule_with_floor(
    kind: str, optimizer: Optimizer, *, warmup_steps: int, total_steps: int, min_lr: float, **options: Any
) -> LambdaLR:
    """One of ``MIN_LR_SCHEDULES``, ending at ``min_lr`` for every group.

    transformers takes ``min_lr`` as a share of the optimizer's default rate, so a group with another rate ends at
    another floor. Here each group follows transformers' schedule of an optimizer whose default is the group's rate. A
    group whose rate is ``min_lr`` or less keeps it after the warmup.

    Example:
        cosine_warmup_with_min_lr, rate 1e-4, 1,000 steps, 100 of warmup, ``min_lr`` 1e-6: step 0 has 1e-6, step 99
        1e-4, step 999 1e-6.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    lambdas: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        peak = float(group["initial_lr"] if "initial_lr" in group else group["lr"])
        alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak or 1.0)
        told = {"min_lr": min(min_lr, peak or 1.0)} | options
        schedule: Any = get_scheduler(kind, alone, warmup_steps, total_steps, scheduler_specific_kwargs=told)
        lambdas.append(partial(_held, course=schedule.lr_lambdas[0], last=max(total_steps - 1, 0)))
    return LambdaLR(optimizer, lambdas)


def _held(step: int, *, course: Callable[[int], float], last: int) -> float:
    """A schedule that stays where it ended; transformers' goes up again."""
    return course(min(step, last))


def _kind_of(name: str, norms: set[str], kinds: dict[str, Any]) -> str:
    if "lora_B" in kinds and any(mark in name for mark in LORA_B):
        return "lora_B"
    exempt = name in norms or name.endswith(NO_DECAY_ENDINGS) or any(mark in name for mark in NO_DECAY_MARKS)
    return "no_decay" if exempt else "decay"


def _projected(groups: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our groups, those parameters apart that ``theirs`` gives a rank."""
    projections = {
        id(p): {k: v for k, v in group.items() if k != "params"} for group in theirs for p in group["params"]
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
            "the optimizer projects gradients of Linear layers, and none of those that it is told to "
            "(training.galore_target_modules, or optim_target_modules) trains. Name others, or take another optimizer."
        )
    return split


def _norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that a normalisation layer holds itself: told by its class, so that none is missed."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }


def _let_projections_load(cls: type[Optimizer]) -> None:
    """Their state holds objects of two classes, which ``torch.load`` takes from a checkpoint only if it is told so."""
    import torch

    for module, name in PROJECTORS:
        if module.partition(".")[0] == cls.__module__.partition(".")[0]:
            torch.serialization.add_safe_globals([getattr(import_module(module), name)])


def _check_each_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    # Once at the start: a parameter in no group would silently stay as it is.
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == wanted, f"{len(wanted ^ set(grouped))} parameters are in no group"
