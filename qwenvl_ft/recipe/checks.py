"""Settings that are each right and cannot be together."""

from typing import Any

from qwenvl_ft.errors import RecipeError, hint

TOKEN_PIXELS = 32 * 32
"""Pixels that one token of Qwen3-VL covers: patches of 16 x 16, merged 2 x 2."""
MIN_LR_SCHEDULES = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
"""Schedules that end above zero."""
DATASET_KEYS = ("annotation_path", "data_path", "reader")


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
    for name, pixels in (("min", low), ("max", high)):
        if pixels is not None and pixels // TOKEN_PIXELS >= length:
            return (
                f"template.{name}_pixels={pixels} lets one image take {pixels // TOKEN_PIXELS} tokens, but "
                f"template.max_length={length}. Lower the first or raise the second."
            )
    return None


def _datasets(recipe: Any) -> str | None:
    for name, entry in recipe.data.datasets.items():
        unknown = [key for key in entry if key not in DATASET_KEYS]
        if unknown:
            return f"data.datasets.{name}: unknown key {unknown[0]!r}.{hint(unknown[0], DATASET_KEYS)}"
        if "annotation_path" not in entry:
            return f"data.datasets.{name} has no annotation_path. Example: {name}: {{annotation_path: a.jsonl}}."
    return None


def _nothing_trains(recipe: Any) -> str | None:
    told = recipe.tuner
    if told.freeze_llm and told.freeze_vit and told.freeze_aligner and not told.modules_to_save:
        return (
            "tuner.freeze_llm, freeze_vit and freeze_aligner are all true, so nothing would train. "
            "Set one of them to false."
        )
    return None


def _packing(recipe: Any) -> str | None:
    training = recipe.training
    if not training.packing:
        return None
    if training.pack_dataset_break_mode == "break":
        return (
            "training.pack_dataset_break_mode=break would cut samples, and images with them. Use no_break_longest_only."
        )
    if training.lazy_tokenize:
        return (
            "training.packing=true needs all lengths before the first step, which training.lazy_tokenize=true "
            "forbids. Set one of them to false."
        )
    if not training.padding_free:
        return "training.padding_free=false pads one sample a row. Set training.packing=false with it."
    return None


def _placement(recipe: Any) -> str | None:
    fsdp = _argument(recipe, "fsdp")
    if recipe.deepspeed.enabled and recipe.model.device_map is not None:
        return "deepspeed.enabled=true places the model itself. Remove model.device_map."
    if recipe.deepspeed.enabled and fsdp:
        return f"deepspeed.enabled=true and training.fsdp={fsdp} both shard the model. Keep one."
    if fsdp and recipe.model.device_map is not None:
        return f"training.fsdp={fsdp} places the model itself. Remove model.device_map."
    if recipe.model.max_memory is not None and recipe.model.device_map is None:
        return "model.max_memory limits model.device_map, which is not set. Add model.device_map=auto."
    return None


def _evaluation(recipe: Any) -> str | None:
    strategy = _argument(recipe, "eval_strategy")
    wants = [
        name
        for name, on in (
            ("training.save_strategy=best", _argument(recipe, "save_strategy") == "best"),
            ("training.load_best_model_at_end=true", _argument(recipe, "load_best_model_at_end")),
            ("training.early_stopping_patience", recipe.training.early_stopping_patience is not None),
        )
        if on
    ]
    if wants and not recipe.data.val:
        return f"{wants[0]} needs an evaluation set. Set data.val."
    if wants and strategy == "no":
        return f"{wants[0]} needs evaluations. Set training.eval_strategy=steps and training.eval_steps."
    if strategy != "no" and not recipe.data.val:
        return f"training.eval_strategy={strategy} needs an evaluation set. Set data.val."
    if recipe.evaluation.run_after_training and not (recipe.evaluation.data or recipe.data.val):
        return "evaluation.run_after_training=true needs a set to ask about. Set evaluation.data or data.val."
    return None


def _best(recipe: Any) -> str | None:
    """The best checkpoint can only be loaded if it was saved when it was measured."""
    evaluate, save = _argument(recipe, "eval_strategy"), _argument(recipe, "save_strategy")
    if not _argument(recipe, "load_best_model_at_end") or save == "best":
        return None
    if save != evaluate:
        return (
            f"training.load_best_model_at_end=true needs a checkpoint at each evaluation, but training.save_strategy="
            f"{save} and training.eval_strategy={evaluate}. Make them equal, or set training.save_strategy=best."
        )
    every, measured = _argument(recipe, "save_steps"), _argument(recipe, "eval_steps")
    if save == "steps" and every >= 1 and measured >= 1 and every % measured:
        return (
            f"training.load_best_model_at_end=true needs checkpoints at evaluations, but training.save_steps={every} "
            f"is no multiple of training.eval_steps={measured}. Change one of them."
        )
    return None


def _precision(recipe: Any) -> str | None:
    if _argument(recipe, "bf16") and _argument(recipe, "fp16"):
        return "training.bf16 and training.fp16 are both true. Keep one."
    return None


def _schedule(recipe: Any) -> str | None:
    kind, options = _argument(recipe, "lr_scheduler_type"), _argument(recipe, "lr_scheduler_kwargs")
    if isinstance(options, dict) and "min_lr" in options and kind not in MIN_LR_SCHEDULES:
        return (
            f"training.lr_scheduler_type={kind} has no min_lr. Set training.lr_scheduler_kwargs=null, or use "
            "cosine_warmup_with_min_lr."
        )
    return None


def _argument(recipe: Any, name: str) -> Any:
    """A field of TrainingArguments, None where neither the recipe nor our defaults say anything."""
    told = recipe.training.arguments
    return told[name] if name in told else None


CHECKS = (
    _pixels,
    _datasets,
    _nothing_trains,
    _packing,
    _placement,
    _evaluation,
    _best,
    _precision,
    _schedule,
)
