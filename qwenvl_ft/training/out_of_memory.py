"""Turns an out-of-memory error into advice: settings that need less memory, the cheapest first."""

from copy import deepcopy
from typing import Any

from qwenvl_ft.errors import TrainingError
from qwenvl_ft.recipe.checks.method import shared_rows
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.activation_checkpointing import chosen_parts
from qwenvl_ft.upstream.arguments import recomputes


def out_of_memory(recipe: Recipe, args: Any, step: int, cause: BaseException) -> TrainingError:
    """Build the error for a full device: the step, torch's first two sentences, and the `remedies` left.

    Args:
        args: the run's TrainingArguments.
        step: number of finished steps.
    """
    reason = ". ".join(str(cause).split(". ")[:2])
    advice = "; ".join(remedies(recipe, args))
    return TrainingError(f"out of memory after step {step}: {reason}. Try, in this order: {advice}.")


def remedies(recipe: Recipe, args: Any) -> list[str]:
    """Return the settings, as ``section.key=value``, that this run does not use yet and that need less memory."""
    parts = chosen_parts(recipe.training)
    rows, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    method, length, deepspeed = recipe.tuner.train_type, recipe.template.max_length, recipe.deepspeed
    arguments = recipe.training.arguments
    checkpointing = arguments.get("activation_checkpointing_kwargs") or {}
    offloaded = deepspeed.enabled and deepspeed.config == "zero3_offload"
    applies = {
        "training.activation_checkpointing=true": not recomputes(args),
        "training.llm_gradient_checkpointing=true": recomputes(args) and not parts["llm"],
        "training.vit_gradient_checkpointing=true": recomputes(args) and not parts["vision"],
        "training.per_device_train_batch_size=1 "
        f"training.gradient_accumulation_steps={accumulated * rows}, the same batch": rows > 1,
        "model.attn_impl=auto": recipe.model.attn_impl in ("sdpa", "eager"),
        _sharing(recipe, accumulated): _can_share(recipe, args.world_size),
        f"template.max_length={length // 2}": length > 2048,
        "a lower template.max_pixels": True,
        "deepspeed.enabled=true deepspeed.config=zero3": args.world_size > 1 and not deepspeed.enabled,
        "training.optim=adamw_8bit": method == "full"
        and arguments.get("optim") in (None, "adamw_torch", "adamw_torch_fused"),
        "tuner.train_type=lora": method == "full",
        "quantization.quantization_bit=4": method == "lora" and recipe.quantization.quantization_bit is None,
        "training.activation_checkpointing_kwargs.offload=true": recomputes(args) and not checkpointing.get("offload"),
        "deepspeed.enabled=true deepspeed.config=zero3_offload": not offloaded,
    }
    return [setting for setting, is_left in applies.items() if is_left]


def _sharing(recipe: Recipe, accumulated: int) -> str:
    """Return the settings by which twice as many processes share each row of the same batch."""
    return (
        f"training.sequence_parallel_size={2 * recipe.training.sequence_parallel_size} "
        f"training.gradient_accumulation_steps={2 * accumulated}, the same batch"
    )


def _can_share(recipe: Recipe, world_size: int) -> bool:
    """Return True if twice as many processes could share each row."""
    shared = deepcopy(recipe)
    shared.training.sequence_parallel_size *= 2
    return world_size % shared.training.sequence_parallel_size == 0 and shared_rows(shared) is None
