"""Settings that are each right and cannot be together."""

from typing import Any

from qwenvl_ft.errors import RecipeError

TOKEN_PIXELS = 32 * 32
"""Pixels that one token of Qwen3-VL covers: patches of 16 x 16, merged 2 x 2."""


def check(recipe: Any) -> None:
    """Raises RecipeError for the first contradiction, with the key to change."""
    for contradiction in CHECKS:
        told = contradiction(recipe)
        if told:
            raise RecipeError(told)


def _pixels(recipe: Any) -> str | None:
    low, high, length = recipe.template.min_pixels, recipe.template.max_pixels, recipe.template.max_length
    if low is not None and high is not None and low > high:
        return f"template.min_pixels={low} is above template.max_pixels={high}. Lower the first."
    if high is not None and high // TOKEN_PIXELS >= length:
        return (
            f"template.max_pixels={high} lets one image take {high // TOKEN_PIXELS} tokens, but template.max_length="
            f"{length}. Lower the first or raise the second."
        )
    return None


def _packing(recipe: Any) -> str | None:
    training = recipe.training
    if training.packing and training.lazy_tokenize:
        return "training.packing=true needs all lengths before the first step. Remove training.lazy_tokenize."
    if training.packing and not training.padding_free:
        return "training.padding_free=false pads one sample a row. Set training.packing=false with it."
    return None


def _placement(recipe: Any) -> str | None:
    if recipe.deepspeed.enabled and recipe.model.device_map is not None:
        return "deepspeed.enabled=true places the model itself. Remove model.device_map."
    if recipe.model.max_memory is not None and recipe.model.device_map is None:
        return "model.max_memory limits model.device_map, which is not set. Add model.device_map=auto."
    return None


def _best(recipe: Any) -> str | None:
    told = recipe.training.arguments
    wants = [
        name
        for name, on in (
            ("training.save_strategy=best", told["save_strategy"] == "best"),
            ("training.load_best_model_at_end=true", told.get("load_best_model_at_end", False)),
            ("training.early_stopping_patience", recipe.training.early_stopping_patience is not None),
        )
        if on
    ]
    if wants and not recipe.data.val:
        return f"{wants[0]} needs an evaluation set. Set data.val."
    if wants and told["eval_strategy"] == "no":
        return f"{wants[0]} needs evaluations. Set training.eval_strategy=steps and training.eval_steps."
    if told["eval_strategy"] != "no" and not recipe.data.val:
        return f"training.eval_strategy={told['eval_strategy']} needs an evaluation set. Set data.val."
    return None


def _rates(recipe: Any) -> str | None:
    told = recipe.training.arguments
    if told.get("bf16") and told.get("fp16"):
        return "training.bf16 and training.fp16 are both true. Keep one."
    return None


CHECKS = (_pixels, _packing, _placement, _best, _rates)
