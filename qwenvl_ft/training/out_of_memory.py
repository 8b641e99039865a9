"""What to try when a device's memory is not enough: settings that would need less, the cheapest first."""

from typing import Any

from qwenvl_ft.errors import TrainingError
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.checkpointing import chosen_parts
from qwenvl_ft.upstream.arguments import recomputes


def out_of_memory(recipe: Recipe, args: Any, step: int, cause: BaseException) -> TrainingError:
    """The error for a device that is full: when, torch's first two sentences, and what this run has left to try.

    Args:
        args: the run's TrainingArguments.
        step: steps that were finished.
    """
    told = ". ".join(str(cause).split(". ")[:2])
    left = "; ".join(remedies(recipe, args))
    return TrainingError(f"out of memory after step {step}: {told}. Try, in this order: {left}.")


def remedies(recipe: Recipe, args: Any) -> list[str]:
    """Settings that this run does not have yet and that take less memory, as they are given."""
    parts = chosen_parts(recipe.training)
    rows, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    chosen, length, zero = recipe.tuner.train_type, recipe.template.max_length, recipe.deepspeed
    said = recipe.training.arguments
    kept = said.get("activation_checkpointing_kwargs") or {}
    applies = {
        "training.activation_checkpointing=true": not recomputes(args),
        "training.llm_gradient_checkpointing=true": recomputes(args) and not parts["llm"],
        "training.vit_gradient_checkpointing=true": recomputes(args) and not parts["vision"],
        "training.per_device_train_batch_size=1 "
        f"training.gradient_accumulation_steps={accumulated * rows}, the same batch": rows > 1,
        "model.attn_impl=auto": recipe.model.attn_impl in ("sdpa", "eager"),
        f"template.max_length={length // 2}": length > 2048,
        "a lower template.max_pixels": True,
        "deepspeed.enabled=true deepspeed.config=zero3": args.world_size > 1 and not zero.enabled,
        "training.optim=adamw_8bit": chosen == "full"
        and said.get("optim") in (None, "adamw_torch", "adamw_torch_fused"),
        "tuner.train_type=lora": chosen == "full",
        "quantization.quantization_bit=4": chosen == "lora" and recipe.quantization.quantization_bit is None,
        "training.activation_checkpointing_kwargs.offload=true": recomputes(args) and not kept.get("offload"),
        "deepspeed.enabled=true deepspeed.config=zero3_offload": not (zero.enabled and zero.config == "zero3_offload"),
    }
    return [setting for setting, open_to_try in applies.items() if open_to_try]
