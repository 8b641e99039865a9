"""Builds transformers' TrainingArguments from a recipe, with the settings that our data and loss rely on."""

import os
from copy import copy
from typing import Any

import torch
from transformers import TrainingArguments

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.source import load_config
from qwenvl_ft.recipe.checks.evaluation import higher_is_better
from qwenvl_ft.recipe.keys import argument_types
from qwenvl_ft.recipe.refused import FIXED
from qwenvl_ft.recipe.schema import GALORE, Recipe
from qwenvl_ft.training.activation_checkpointing import chosen_parts
from qwenvl_ft.training.deepspeed import deepspeed_config, hierarchical
from qwenvl_ft.training.hybrid_sharding import parallelism
from qwenvl_ft.training.launcher_agrees import require_launcher_agrees
from qwenvl_ft.tuning.optimizer import LORAPLUS_RATIO
from qwenvl_ft.upstream.arguments import as_installed, require_checkpointing_options
from qwenvl_ft.upstream.launcher import compiling_as_launched

LEARNING_RATES = {"full": 1e-5}
TUNER_LEARNING_RATE = 1e-4
"""Default learning rates: 1e-5 where ``train_type`` moves the base weights, 1e-4 for adapters, which start at zero."""
MAX_WORKERS = 8
"""Maximum default number of dataloader workers per rank; eight make more samples per second than a GPU consumes."""


def build_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the TrainingArguments of a recipe.

    Mixed precision follows ``model.torch_dtype`` unless the recipe sets it.

    Raises:
        RecipeError: a setting is not supported, or transformers refuses a combination, with its message.
    """
    kwargs: dict[str, Any] = dict(recipe.training.arguments)
    if kwargs["dataloader_num_workers"] == "auto":
        kwargs["dataloader_num_workers"] = workers_for_cores()
    kwargs |= {name: copy(only) for name, (only, _) in FIXED.items() if name in argument_types()}
    kwargs["learning_rate"] = learning_rate(recipe)
    kwargs |= galore(recipe)
    kwargs.setdefault("use_cpu", not torch.accelerator.is_available())
    dtype = weights_dtype(recipe)
    for name, half in (("bf16", "bfloat16"), ("fp16", "float16")):
        kwargs.setdefault(name, dtype == half and not kwargs.get("fp16" if name == "bf16" else "bf16", False))
    if recipe.training.lisa_activated_layers:
        kwargs["ddp_find_unused_parameters"] = True  # the layers that are not drawn have no gradient
    if "ddp_backend" in kwargs:
        kwargs["ddp_backend"] = ddp_backend(kwargs["ddp_backend"])
    if "parallelism_config" in kwargs:
        kwargs["parallelism_config"] = parallelism(kwargs["parallelism_config"])
    if recipe.deepspeed.enabled:
        kwargs["deepspeed"] = hierarchical(deepspeed_config(recipe.deepspeed.config), recipe.deepspeed)
    kwargs["activation_checkpointing"] = any(chosen_parts(recipe.training).values())
    if kwargs["activation_checkpointing"]:
        options = {"use_reentrant": False} | (kwargs.get("activation_checkpointing_kwargs") or {})
        require_checkpointing_options(options)
        kwargs["activation_checkpointing_kwargs"] = options
    require_launcher_agrees(recipe, kwargs)
    if kwargs.get("load_best_model_at_end") or kwargs.get("save_strategy") == "best":
        kwargs.setdefault("metric_for_best_model", "eval_loss")
    if kwargs.get("metric_for_best_model"):
        # Perplexity improves downwards too; transformers knows this only of names that end in "loss".
        kwargs.setdefault("greater_is_better", higher_is_better(recipe, kwargs["metric_for_best_model"]))
    try:
        with compiling_as_launched():
            return TrainingArguments(**as_installed(kwargs))
    except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
        raise RecipeError(f"training: {error}") from None


def learning_rate(recipe: Recipe) -> float:
    """Return the language model's learning rate: the recipe's, or the default of its ``train_type``."""
    if recipe.training.learning_rate is not None:
        return recipe.training.learning_rate
    return LEARNING_RATES.get(recipe.tuner.train_type, TUNER_LEARNING_RATE)


def galore(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of TrainingArguments that ``training.use_galore`` stands for; empty without it."""
    section = recipe.training
    if not (section.use_galore or section.optimizer == "galore"):
        return {}
    optim = str(section.arguments["optim"]) if "optim" in section.arguments else "adamw_torch"
    options = {
        "rank": section.galore_rank,
        "update_proj_gap": section.galore_update_proj_gap,
        "scale": section.galore_scale,
        "proj_type": section.galore_proj_type,
    }
    return {
        "optim": GALORE[optim],
        "optim_target_modules": list(section.galore_target_modules),
        "optim_args": ",".join(f"{name}={value}" for name, value in options.items()),
    }


def lora_plus(recipe: Recipe) -> float | None:
    """Return the ratio of the learning rates of LoRA's B and A matrices (LoRA+); None for one rate for both."""
    if recipe.training.lorap_lr_ratio is None and recipe.training.optimizer == "lorap":
        return LORAPLUS_RATIO
    return recipe.training.lorap_lr_ratio


def ddp_backend(backend: str | None) -> str | None:
    """Return ``training.ddp_backend``, or None for one rank, where transformers would look for a process group.

    Raises:
        RecipeError: this torch does not have the backend.
    """
    if backend is not None and not torch.distributed.is_backend_available(backend):
        raise RecipeError(f"training.ddp_backend={backend} is not part of this torch. Remove the key.")
    return backend if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def workers_for_cores() -> int:
    """Return the default number of dataloader workers of a rank: its share of the cores minus one, 1 to 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(len(os.sched_getaffinity(0)) // ranks - 1, 1), MAX_WORKERS)


def weights_dtype(recipe: Recipe) -> str:
    """Return ``model.torch_dtype``, or for ``auto`` the dtype in the model's config.json."""
    if recipe.model.torch_dtype != "auto" or not recipe.model.model:
        return recipe.model.torch_dtype
    config = load_config(str(recipe.model.model), revision=recipe.model.model_revision)
    return str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
