"""A recipe -> transformers' TrainingArguments: what Trainer needs, and the settings our loop relies on."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.load import load_config
from qwenvl_ft.recipe.load import recipe_folders

LEARNING_RATES = {"full": 1e-5}
TUNER_LEARNING_RATE = 1e-4
"""Where the recipe gives none: 1e-5 moves all weights, adapters start from nothing and take 1e-4."""

RELIED_ON: dict[str, Any] = {
    "remove_unused_columns": False,  # our batches are not columns
    "dataloader_drop_last": False,  # no record is left out of an epoch
    "label_names": ["labels"],
    "logging_nan_inf_filter": False,  # would hide what TrainingError reports, and wait for the device each step
    "average_tokens_across_devices": True,
    "ddp_find_unused_parameters": False,  # every trained parameter is in every pass; see vision_fillers
    "disable_tqdm": True,  # the console callback shows progress
    "restore_callback_states_from_checkpoint": False,
}


def learning_rate(recipe: Any) -> float:
    """The language model's learning rate: the recipe's, or the default of its ``train_type``."""
    if recipe.training.learning_rate is not None:
        return recipe.training.learning_rate
    return LEARNING_RATES.get(recipe.tuner.train_type, TUNER_LEARNING_RATE)


def deepspeed_config(config: str | dict[str, Any]) -> str | dict[str, Any]:
    """A preset's file, a file, or a config as it is.

    Raises:
        RecipeError: neither a preset nor a file; or its gradient clipping is not Trainer's to fill in.
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
    if isinstance(config, dict) and "gradient_clipping" not in config:
        raise RecipeError(
            'deepspeed.config has no "gradient_clipping", so DeepSpeed would clip nothing, whatever '
            'training.max_grad_norm says. Add "gradient_clipping": "auto".'
        )
    return config


def weights_dtype(recipe: Any) -> str:
    """``model.torch_dtype``, or for ``auto`` the one that the model's config names."""
    if recipe.model.torch_dtype != "auto" or not recipe.model.model:
        return recipe.model.torch_dtype
    config = load_config(str(recipe.model.model), revision=recipe.model.model_revision)
    return str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")


def build_arguments(recipe: Any) -> TrainingArguments:
    """TrainingArguments of a recipe.

    Mixed precision follows ``model.torch_dtype`` unless the recipe says otherwise.

    Raises:
        RecipeError: transformers refuses a combination; its own words, on one line.
    """
    told: dict[str, Any] = dict(recipe.training.arguments)
    clash = sorted(key for key in RELIED_ON if key in told and told[key] != RELIED_ON[key])
    if clash:
        raise RecipeError(
            f"training.{clash[0]}={told[clash[0]]!r} cannot be changed here: the loop relies on "
            f"{RELIED_ON[clash[0]]!r}. Remove the key."
        )
    told |= RELIED_ON
    told["learning_rate"] = learning_rate(recipe)
    told.setdefault("use_cpu", not torch.accelerator.is_available())
    dtype = weights_dtype(recipe)
    for name, half in (("bf16", "bfloat16"), ("fp16", "float16")):
        told.setdefault(name, dtype == half and not told.get("fp16" if name == "bf16" else "bf16", False))
    if recipe.deepspeed.enabled:
        told["deepspeed"] = deepspeed_config(recipe.deepspeed.config)
    if told["activation_checkpointing"]:
        told.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    if told.get("load_best_model_at_end") or told.get("save_strategy") == "best":
        told.setdefault("metric_for_best_model", "eval_loss")
        told.setdefault("greater_is_better", False)  # loss and perplexity; transformers knows only names ending in loss
    try:
        args = TrainingArguments(**told)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from None
    join_processes(args)
    return args


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
