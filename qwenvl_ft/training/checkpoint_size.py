"""How many bytes does a checkpoint of this run take? Computed from its weights and its optimizer, before it begins."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from qwenvl_ft.upstream.whole import full_size, is_partitioned

TRIAL = (64, 256)
"""Shape of the parameter by which an optimizer's state is measured; 8-bit optimizers keep smaller ones in 32 bits."""


def weight_bytes(model: nn.Module, *, adapter: bool) -> int:
    """Return the bytes of the weights that are saved: all, or of an adapter those that are trained."""
    return sum(_count(p) * p.element_size() for p in model.parameters() if p.requires_grad or not adapter)


def optimizer_bytes(model: nn.Module, args: Any) -> int:
    """Return the bytes of the optimizer's state; 0 if they are not known before it has run."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.deepspeed is not None:  # in float32: the weights and two averages
        return sum(12 * _count(parameter) for parameter in trained)
    ratios = {dtype: _state_bytes(args, dtype) for dtype in {parameter.dtype for parameter in trained}}
    return sum(int(ratios[parameter.dtype] * _count(parameter)) for parameter in trained)


def checkpoint_bytes(model: nn.Module, args: Any, *, adapter: bool, sharded: bool) -> int:
    """Return about how many bytes a checkpoint takes, at least; the processor's files are left out.

    Args:
        sharded: DeepSpeed or FSDP shards the model, by the recipe or by accelerate's configuration.
    """
    weights = weight_bytes(model, adapter=adapter)
    if args.save_only_model:
        return weights
    copies = 2 if sharded else 1  # one to be loaded, one to go on
    return weights * copies + optimizer_bytes(model, args)


def planned_checkpoints(args: Any, state: Any) -> int:
    """Return the number of checkpoints that a run leaves, with the one that is written before an old one is removed."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    per_run: int = math.ceil(args.num_train_epochs) if strategy == "epoch" else state.max_steps
    if strategy == "steps":
        per_run = math.ceil(state.max_steps / max(state.save_steps, 1))
    kept: int | None = args.save_total_limit
    if strategy == "best" and kept is None:
        return 1
    return per_run if kept is None else min(per_run, kept + 1)


def _state_bytes(args: Any, dtype: torch.dtype) -> float:
    """Return the bytes of the optimizer's state for one weight, measured on a small one; 0.0 if it cannot be tried."""
    parameter = nn.Parameter(torch.zeros(TRIAL, dtype=dtype, device=args.device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = cls([{"params": [parameter], "lr": args.learning_rate}], **options)
        optimizer.step()
    except Exception:  # e.g. it is built from the model's modules
        return 0.0
    states = [value for values in optimizer.state.values() for value in values.values()]
    sizes = [value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor)]
    return sum(size for size in sizes if size > 8) / parameter.numel()  # without counters of steps


def _count(parameter: nn.Parameter) -> int:
    """Return the number of stored values: packed as they are, but whole where this rank holds only a part."""
    return full_size(parameter) if is_partitioned(parameter) else parameter.numel()
