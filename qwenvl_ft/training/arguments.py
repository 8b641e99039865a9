"""A recipe -> transformers' TrainingArguments: what Trainer needs, and the settings our loop relies on."""

import json
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.source import load_config
from qwenvl_ft.recipe.keys import argument_types
from qwenvl_ft.recipe.load import recipe_folders
from qwenvl_ft.recipe.refused import FIXED
from qwenvl_ft.recipe.schema import GALORE, SECRETS, Recipe
from qwenvl_ft.recipe.values import shown
from qwenvl_ft.training.checkpointing import chosen_parts
from qwenvl_ft.training.preflight import preflight, try_model
from qwenvl_ft.tuning.optimizer import LORAPLUS_RATIO
from qwenvl_ft.upstream.arguments import as_installed, require_checkpointing_options
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.unused import unused

LEARNING_RATES = {"full": 1e-5}
TUNER_LEARNING_RATE = 1e-4
"""Where the recipe gives none: 1e-5 moves all weights, adapters start from nothing and take 1e-4."""
TRACKERS = {
    "wandb_project": ("wandb", "WANDB_PROJECT"),
    "wandb_entity": ("wandb", "WANDB_ENTITY"),
    "swanlab_project": ("swanlab", "SWANLAB_PROJECT"),
    "swanlab_mode": ("swanlab", "SWANLAB_MODE"),
    "swanlab_token": ("swanlab", "SWANLAB_API_KEY"),
}
"""Key under ``training`` -> the tracker of ``report_to`` that reads it, and by which environment variable."""
MAX_WORKERS = 8
"""A worker makes more samples a second than an eighth of what a GPU takes of them."""
DECIDED_HERE = {
    "optimizer": "training.optim and the learning rates of the parts",
    "scheduler": "training.lr_scheduler_type and warmup_steps",
}
"""Section that a DeepSpeed configuration may not have -> the keys that say it instead."""


def learning_rate(recipe: Recipe) -> float:
    """The language model's learning rate: the recipe's, or the default of its ``train_type``."""
    if recipe.training.learning_rate is not None:
        return recipe.training.learning_rate
    return LEARNING_RATES.get(recipe.tuner.train_type, TUNER_LEARNING_RATE)


def deepspeed_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """A preset's file, a file, or a config as it is.

    Raises:
        RecipeError: neither a preset nor a file, no mapping, gradient clipping that is not Trainer's to fill in, or
            an optimizer or schedule of its own.
    """
    if isinstance(config, str):
        folders = [folder / "deepspeed" for folder in recipe_folders()]
        presets = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.json")}
        path = presets.get(config, Path(config))
        if not path.is_file():
            raise RecipeError(f"deepspeed.config: there is no file and no preset {config!r}.{hint(config, presets)}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"deepspeed.config: {path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed.config: {shown(config)} is not a mapping, as a DeepSpeed configuration is.")
    if "gradient_clipping" not in config:
        raise RecipeError(
            'deepspeed.config has no "gradient_clipping", so DeepSpeed would clip nothing, whatever '
            'training.max_grad_norm says. Add "gradient_clipping": "auto".'
        )
    for section, keys in DECIDED_HERE.items():
        if section in config:
            raise RecipeError(f'deepspeed.config has its own "{section}". Remove it: {keys} decide.')
    return config


def stand_alone() -> None:
    """Let DeepSpeed run in one process without a launcher: it would look for MPI."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def hierarchical(config: dict[str, Any], told: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with ``deepspeed.zero_hpz_partition_size``, if there is one (ZeRO++, arXiv 2306.10209).

    Raises:
        RecipeError: the configuration is not ZeRO-3's, so that no weights are sharded.
    """
    if told.zero_hpz_partition_size is None:
        return config
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        raise RecipeError(
            f"deepspeed.zero_hpz_partition_size={told.zero_hpz_partition_size} is for weights that are sharded, and "
            f"the stage is {zero.get('stage', 0)}. Set deepspeed.config=zero3, or remove it."
        )
    return config | {"zero_optimization": zero | {"zero_hpz_partition_size": told.zero_hpz_partition_size}}


def galore(recipe: Recipe) -> dict[str, Any]:
    """The fields of TrainingArguments that ``training.use_galore`` stands for; empty without it."""
    told = recipe.training
    if not (told.use_galore or told.optimizer == "galore"):
        return {}
    optim = str(told.arguments["optim"]) if "optim" in told.arguments else "adamw_torch"
    options = {
        "rank": told.galore_rank,
        "update_proj_gap": told.galore_update_proj_gap,
        "scale": told.galore_scale,
        "proj_type": told.galore_proj_type,
    }
    return {
        "optim": GALORE[optim],
        "optim_target_modules": list(told.galore_target_modules),
        "optim_args": ",".join(f"{name}={value}" for name, value in options.items()),
    }


def lora_plus(recipe: Recipe) -> float | None:
    """Ratio of the rates of LoRA's B and A matrices, if the recipe wants them apart."""
    if recipe.training.lorap_lr_ratio is None and recipe.training.optimizer == "lorap":
        return LORAPLUS_RATIO
    return recipe.training.lorap_lr_ratio


def connection(backend: str | None) -> str | None:
    """``training.ddp_backend``, or None for one process, which transformers would look for a connection of.

    Raises:
        RecipeError: this torch does not have it.
    """
    if backend is not None and not torch.distributed.is_backend_available(backend):
        raise RecipeError(f"training.ddp_backend={backend} is not part of this torch. Remove the key.")
    return backend if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def workers_for_cores() -> int:
    """Loader workers of one process: its share of the cores without the one it runs on itself, 1 to 8."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(len(os.sched_getaffinity(0)) // processes - 1, 1), MAX_WORKERS)


def weights_dtype(recipe: Recipe) -> str:
    """``model.torch_dtype``, or for ``auto`` the one that the model's config names."""
    if recipe.model.torch_dtype != "auto" or not recipe.model.model:
        return recipe.model.torch_dtype
    config = load_config(str(recipe.model.model), revision=recipe.model.model_revision)
    return str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")


def build_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of a recipe.

    Mixed precision follows ``model.torch_dtype`` unless the recipe says otherwise. ``training.logging_dir`` becomes the
    environment variable by which transformers knows it.

    Raises:
        RecipeError: transformers refuses a combination, in its own words; or what `preflight` says.
    """
    told: dict[str, Any] = dict(recipe.training.arguments)
    if told["dataloader_num_workers"] == "auto":
        told["dataloader_num_workers"] = workers_for_cores()
    told |= {name: copy(only) for name, (only, _) in FIXED.items() if name in argument_types()}
    told["learning_rate"] = learning_rate(recipe)
    told |= galore(recipe)
    told.setdefault("use_cpu", not torch.accelerator.is_available())
    dtype = weights_dtype(recipe)
    for name, half in (("bf16", "bfloat16"), ("fp16", "float16")):
        told.setdefault(name, dtype == half and not told.get("fp16" if name == "bf16" else "bf16", False))
    if "ddp_backend" in told:
        told["ddp_backend"] = connection(told["ddp_backend"])
    if recipe.deepspeed.enabled:
        told["deepspeed"] = hierarchical(deepspeed_config(recipe.deepspeed.config), recipe.deepspeed)
    told["activation_checkpointing"] = any(chosen_parts(recipe.training).values())
    if told["activation_checkpointing"]:
        told.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
        require_checkpointing_options(told["activation_checkpointing_kwargs"])
    if told.get("load_best_model_at_end") or told.get("save_strategy") == "best":
        told.setdefault("metric_for_best_model", "eval_loss")
        told.setdefault("greater_is_better", False)  # loss and perplexity; transformers knows only names ending in loss
    try_model(recipe)
    fallbacks()  # asked once, before DeepSpeed shards every model that is made
    if recipe.deepspeed.enabled:
        stand_alone()
    try:
        args = TrainingArguments(**as_installed(told))
    except (ValueError, TypeError, ImportError, OSError, KeyError) as error:
        raise RecipeError(f"training: {error}") from None
    join_processes(args)
    preflight(recipe, args)
    if recipe.training.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = recipe.training.logging_dir
    tell_trackers(recipe.training, list(args.report_to or []))
    return args


def unused_packages(recipe: Recipe) -> AbstractContextManager[None]:
    """Inside, what the recipe does not use is not imported by the libraries that find it installed."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    return nullcontext() if recipe.deepspeed.enabled or launched else unused("deepspeed")


def tell_trackers(told: Any, report_to: list[str]) -> None:
    """Set the environment variables that trackers are configured by; without any tracker nothing is read.

    Raises:
        RecipeError: ``report_to`` names others than the tracker that would read a setting.
    """
    for name, (tracker, variable) in TRACKERS.items():
        value = getattr(told, name)
        if value is None or not report_to:
            continue
        if tracker not in report_to:
            given = "" if name in SECRETS else f"={value}"
            raise RecipeError(
                f"training.{name}{given} is read by {tracker} alone, and training.report_to is "
                f"{', '.join(report_to)}. Add {tracker} to it, or remove training.{name}."
            )
        os.environ[variable] = value


def join_processes(args: TrainingArguments) -> None:
    """See that all started processes are one run, before the model is loaded.

    On a CPU transformers joins them only if told to use it, and DeepSpeed, which shards the model while it is loaded,
    does not look for a process group that it did not make itself: both would train on alone, each on all data.

    Raises:
        RecipeError: the launcher started more processes than the run sees.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise RecipeError(
            f"the launcher started {started} processes, but this run sees {args.world_size}: each would train alone. "
            "Launch by torchrun or accelerate on devices of one kind, or set training.use_cpu=true."
        )
    if args.deepspeed is not None and torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def leave_processes() -> None:
    """Let the slowest process finish before any goes: one that leaves early takes the others' connections with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
