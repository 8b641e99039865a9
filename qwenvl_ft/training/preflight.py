"""What a run would stumble over once it has begun, tried before: each failure is one line, and nothing is written.

transformers builds the optimizer, the schedule, the trackers and the hub's repository after the data was measured and
the output folder made. Here each is built, or asked for, once on nothing.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.errors import QwenVLError, RecipeError, one_line
from qwenvl_ft.model.adapters.load import trained_lengths
from qwenvl_ft.model.config import skeleton
from qwenvl_ft.model.kernels import require_liger
from qwenvl_ft.model.load import loading_options, plan_loading
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.tuning.stages import Earlier
from qwenvl_ft.upstream.layers import COMPILED
from qwenvl_ft.upstream.unused import unused

NEEDS_MODEL = ("galore", "apollo", "lomo", "adalomo")
"""Beginnings of the names of optimizers that are built from the model's own modules."""
IMPORTED_TO_BE_FOUND = ("wandb", "comet_ml")
"""Trackers that transformers imports to know whether they are there."""
MANY_STEPS = 10**6
PROBES = ("1", "0.5")
"""Values of ``optim_args`` that no option takes for the same."""


def preflight(recipe: Recipe, args: TrainingArguments) -> None:
    """Try everything of a run that needs no data.

    Raises:
        RecipeError: the key and the value that fail, and what is said of them.
    """
    for trial in TRIALS:
        trial(recipe, args)


def _dense(recipe: Recipe, args: Any) -> None:
    """Prompts of dense captions, which may be files, and operations of augmentation."""
    _ = DenseOptions.of(recipe, args.seed).prompts
    Augmenter.from_config(recipe.data.augmentation)


def _optimizer(recipe: Recipe, args: Any) -> None:
    """The optimizer and the schedule, on one parameter."""
    name = str(args.optim.value)
    if name.startswith(NEEDS_MODEL):
        return
    if any(pair.count("=") != 1 for pair in (args.optim_args or "a=b").split(",")):
        raise RecipeError(f"training.optim_args={args.optim_args!r} is not key=value,key=value. Example: momentum=0.9.")
    optimizer = _try(f"training.optim={name}{_beside(args, 'optim_args')}", lambda: _dummy_optimizer(args))
    unread = [key for key in _pairs(args.optim_args) if not _is_read(args, key)]
    if unread:
        raise RecipeError(
            f"training.optim_args={args.optim_args!r}: training.optim={name} has no {unread[0]!r}. Remove it."
        )
    kind = str(args.lr_scheduler_type.value)
    _try(
        f"training.lr_scheduler_type={kind}{_beside(args, 'lr_scheduler_kwargs')}",
        lambda: get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(MANY_STEPS),
            num_training_steps=args.max_steps if args.max_steps > 0 else MANY_STEPS,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        ),
    )


def _dummy_optimizer(args: TrainingArguments) -> torch.optim.Optimizer:
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    parameter = nn.Parameter(torch.zeros(2, 2, device=args.device))
    return cls([{"params": [parameter], "lr": args.learning_rate, "weight_decay": args.weight_decay}], **options)


def _pairs(optim_args: str | None) -> dict[str, str]:
    """``a=1, b=2`` as transformers reads it."""
    return dict(pair.split("=") for pair in optim_args.replace(" ", "").split(",")) if optim_args else {}


def _is_read(args: TrainingArguments, key: str) -> bool:
    """Whether an option changes what the optimizer is built from, or is at least refused."""
    told = args.optim_args
    outcomes = set()
    try:
        for value in (None, *PROBES):
            args.optim_args = None if value is None else f"{key}={value}"
            outcomes.add(str(Trainer.get_optimizer_cls_and_kwargs(args)))
    except (ValueError, TypeError):
        return True
    finally:
        args.optim_args = told
    return len(outcomes) > 1


def _beside(args: TrainingArguments, name: str) -> str:
    value = getattr(args, name)
    return f" with {name}={shown(value)}" if value else ""


def _try(what: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except QwenVLError:
        raise
    except Exception as error:
        raise RecipeError(f"{what} cannot be built: {type(error).__name__}: {error}") from error


def _trackers(recipe: Recipe, args: Any) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    with unused(*(name for name in IMPORTED_TO_BE_FOUND if name not in args.report_to)):
        installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in installed:
            raise RecipeError(
                f"training.report_to={name}: it is not installed. Install its package, or choose another: "
                f"{', '.join(['none', *get_available_reporting_integrations()])}."
            )


def _wandb(recipe: Recipe, args: Any) -> None:
    """Weights & Biases asks for its key, or fails without one, when the first line is logged."""
    silent = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if "wandb" not in args.report_to or silent or args.process_index > 0:
        return
    import wandb

    if not wandb.login(prompt=False):
        raise RecipeError(
            "training.report_to=wandb: there is no API key. Log in by wandb login, set WANDB_API_KEY, or log to a "
            "folder with WANDB_MODE=offline."
        )


def _liger(recipe: Recipe, args: Any) -> None:
    if args.use_liger_kernel:
        require_liger(args.device)


def _compile(recipe: Recipe, args: Any) -> None:
    """The compiler of ``training.torch_compile``, on one sum: on a CPU it needs one for C++."""
    if not args.torch_compile:
        return
    COMPILED.require("training.torch_compile=true")
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    try:
        torch.compile(lambda x: x.sin(), backend=backend, mode=mode)(torch.ones(2, device=args.device))
    except Exception as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise RecipeError(
            f"training.torch_compile=true with {backend} cannot compile here: {cause}. Install what it needs (on a CPU "
            "a C++ compiler: apt-get install g++), or remove the key."
        ) from error


def _sharding(recipe: Recipe, args: Any) -> None:
    if args.fsdp and args.world_size == 1:
        raise RecipeError(
            f"training.fsdp={recipe.training.arguments['fsdp']} shards the model over processes, and there is one. "
            "Start more (accelerate launch --num_processes 2 ...), or remove the key."
        )


def _output(recipe: Recipe, args: Any) -> None:
    """Whether the run can write where it is told to."""
    folder = Path(args.output_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise RecipeError(f"training.output_dir={args.output_dir}: {there} is a file. Give a folder.")
    if not os.access(there, os.W_OK | os.X_OK) or not _takes_folders(there):
        raise RecipeError(f"training.output_dir={args.output_dir}: {there} cannot be written to. Give another folder.")


def _takes_folders(there: Path) -> bool:
    """Whether a folder can be made there: root may write anywhere, and some file systems take nothing."""
    try:
        Path(tempfile.mkdtemp(dir=there)).rmdir()
    except OSError:
        return False
    return True


def _one_device(recipe: Recipe, args: Any) -> None:
    if args.n_gpu > 1 and recipe.model.device_map is None:
        raise RecipeError(
            f"one process sees {args.n_gpu} GPUs. Launch one per GPU (accelerate launch -m qwenvl_ft.train ...), or "
            "show it one by CUDA_VISIBLE_DEVICES=0."
        )


def _batch_size(recipe: Recipe, args: Any) -> None:
    if args.auto_find_batch_size and (args.world_size > 1 or args.deepspeed is not None):
        raise RecipeError(
            "training.auto_find_batch_size=true is for one process without DeepSpeed: of several, the one that runs "
            "out of memory would leave the others waiting. Set training.per_device_train_batch_size."
        )


def _hub(recipe: Recipe, args: Any) -> None:
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        HfApi(token=args.hub_token).whoami()
    except Exception as error:
        cause = one_line(error, 200)
        raise RecipeError(
            f"training.push_to_hub=true, but the hub does not let us in: {type(error).__name__}: {cause} Log in by "
            "hf auth login, or remove the key."
        ) from error


def try_model(recipe: Recipe) -> None:
    """Try everything about the model that its config.json tells: options, module names, positions.

    Call it before TrainingArguments are made: from then on transformers shards any model under ZeRO-3, even one without
    weights.

    Raises:
        RecipeError: the key and the value that do not fit the model.
        CheckpointError: there is no such model.
    """
    told = recipe.model
    if not told.model:
        return
    plan = plan_loading(told.model, loading_options(told, recipe.quantization))
    if plan.adapter is not None:
        raise RecipeError(
            f"model.model={told.model} is an adapter. To go on with it, set model.model={plan.source} and "
            f"tuner.resume_from_checkpoint={told.model}; or merge it first (qwenvl-ft merge)."
        )
    earlier = Earlier.of(recipe.tuner)
    scaling = None if earlier is None else trained_lengths(earlier.folder)[0]
    if scaling is not None and told.rope_scaling is None:
        raise RecipeError(
            f"tuner.resume_from_checkpoint={recipe.tuner.resume_from_checkpoint} was trained with model.rope_scaling="
            f"{shown(scaling)}, and this recipe has none. Set it."
        )
    _names(recipe.tuner, plan.config)
    length, text = recipe.template.max_length, plan.config.get_text_config()
    if length <= text.max_position_embeddings:
        return
    dynamic = text.rope_parameters["rope_type"] == "dynamic"
    why = ", and dynamic would stretch them for all samples of a row that has a longer one" if dynamic else ""
    raise RecipeError(
        f"template.max_length={length} exceeds the {text.max_position_embeddings} positions (max_position_embeddings) "
        f"of {told.model}{why}. Lower it, or stretch the positions by model.rope_scaling=yarn."
    )


def _names(tuner: Any, config: Any) -> None:
    """Whether the recipe's names and sizes fit the model; methods that have no such trial tell when they are built."""
    names = METHODS[tuner.train_type].names
    if names is not None:
        names(skeleton(copy.deepcopy(config)), tuner)


TRIALS = (_dense, _output, _one_device, _sharding, _batch_size, _trackers, _wandb, _optimizer, _liger, _hub, _compile)
