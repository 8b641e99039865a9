"""Can this machine run the recipe? Tries packages, devices, folders and the model's config before anything is written.

transformers builds the optimizer, the schedule, the trackers and the hub's repository only after the data has been
measured and the output folder created. This module tries each of them beforehand; a failure is one line.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from qwenvl_ft.checkpoint.weights_only import require_saved_weights
from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.errors import QwenVLError, RecipeError, one_line
from qwenvl_ft.model.adapters.load import trained_lengths
from qwenvl_ft.model.compiled import require_compilable
from qwenvl_ft.model.config import skeleton
from qwenvl_ft.model.liger_kernels import require_liger
from qwenvl_ft.model.load import loading_options, plan_loading
from qwenvl_ft.model.sequence_parallel import require_model, require_ranks
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown
from qwenvl_ft.training.hybrid_sharding import require_data_parallel
from qwenvl_ft.training.tracker_trial import try_tracker
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.tuning.stages import Earlier
from qwenvl_ft.upstream.layers import COMPILED
from qwenvl_ft.upstream.probe import installed
from qwenvl_ft.upstream.trainer import COMPILING
from qwenvl_ft.upstream.unused import unused

NEEDS_MODEL = ("galore", "apollo", "lomo", "adalomo")
"""Prefixes of optimizers that are built from the model's own modules and cannot be tried without it."""
IMPORTED_TO_BE_FOUND = ("wandb", "comet_ml")
"""Trackers that transformers imports to find out if they are installed."""
MANY_STEPS = 10**6
"""Length of the test schedule if the run's is not known yet, in steps."""
PROBES = ("1", "0.5")
"""Two test values for an option of ``optim_args``; an option that is read gives different arguments for them."""


def preflight(recipe: Recipe, args: TrainingArguments) -> None:
    """Try everything in a run that needs neither data nor weights.

    Raises:
        RecipeError: names the key and value that fail, and the cause.
    """
    for check in CHECKS:
        check(recipe, args)


def _dense(recipe: Recipe, args: Any) -> None:
    """Read the prompts of dense captions, which may be files, and the augmentations."""
    _ = DenseOptions.of(recipe, args.seed).prompts
    Augmenter.from_config(recipe.data.augmentation)


def _optimizer(recipe: Recipe, args: Any) -> None:
    """Build the optimizer and the schedule on one parameter."""
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
    group = {"params": [parameter], "lr": args.learning_rate, "weight_decay": args.weight_decay}
    return cast(torch.optim.Optimizer, cls([group], **options))


def _pairs(optim_args: str | None) -> dict[str, str]:
    """Parse ``a=1, b=2`` as transformers does."""
    return dict(pair.split("=") for pair in optim_args.replace(" ", "").split(",")) if optim_args else {}


def _is_read(args: TrainingArguments, key: str) -> bool:
    """Return True if an option changes the optimizer's arguments or is refused, so that it is not ignored."""
    optim_args = args.optim_args
    outcomes = set()
    try:
        for value in (None, *PROBES):
            args.optim_args = None if value is None else f"{key}={value}"
            outcomes.add(str(Trainer.get_optimizer_cls_and_kwargs(args)))
    except (ValueError, TypeError):
        return True
    finally:
        args.optim_args = optim_args
    return len(outcomes) > 1


def _beside(args: TrainingArguments, name: str) -> str:
    """Return `` with NAME=VALUE`` for a message if the option is set."""
    value = getattr(args, name)
    return f" with {name}={shown(value)}" if value else ""


def _try(setting: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except QwenVLError:
        raise
    except Exception as error:
        raise RecipeError(f"{setting} cannot be built: {type(error).__name__}: {error}") from error


def _trackers(recipe: Recipe, args: Any) -> None:
    from transformers.integrations import integration_utils

    available: Callable[[], list[str]] = integration_utils.get_available_reporting_integrations
    with unused(*(name for name in IMPORTED_TO_BE_FOUND if name not in args.report_to)):
        installed = available()
    for name in args.report_to:
        if name not in installed:
            raise RecipeError(
                f"training.report_to={name}: its package is not installed. Install it, or choose another tracker: "
                f"{', '.join(['none', *available()])}."
            )


def _tracker_trials(recipe: Recipe, args: Any) -> None:
    """Start each tracker once, on the first process, which is the one that reports."""
    for name in args.report_to if args.process_index == 0 else ():
        try_tracker(name)


def _wandb(recipe: Recipe, args: Any) -> None:
    """Require a key of Weights & Biases, which would ask for it, or fail, at the first logged line."""
    silent = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if "wandb" not in args.report_to or silent or args.process_index > 0:
        return
    import wandb

    if not wandb.login(prompt=False):
        raise RecipeError(
            "training.report_to=wandb: there is no API key. Log in with wandb login, set WANDB_API_KEY, or log to a "
            "folder with WANDB_MODE=offline."
        )


def _liger(recipe: Recipe, args: Any) -> None:
    if args.use_liger_kernel:
        require_liger(args.device)


def _compile(recipe: Recipe, args: Any) -> None:
    """Compile one function as ``training.torch_compile`` would; on a CPU this needs a C++ compiler."""
    if not args.torch_compile:
        return
    COMPILED.require("training.torch_compile=true")
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    try:
        torch.compile(lambda x: x.sin(), backend=backend, mode=mode)(torch.ones(2, device=args.device))
    except Exception as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise RecipeError(
            f"training.torch_compile=true with {backend} cannot compile on this machine: {cause}. Install what it "
            "needs (on a CPU a C++ compiler: apt-get install g++), or remove the key."
        ) from error


def _shared_rows(recipe: Recipe, args: Any) -> None:
    require_ranks(recipe.training.sequence_parallel_size, args.world_size)


def _sharding(recipe: Recipe, args: Any) -> None:
    if args.fsdp and args.world_size == 1:
        raise RecipeError(
            f"training.fsdp={recipe.training.arguments['fsdp']} shards the model over processes, but there is only "
            "one. Start more (accelerate launch --num_processes 2 ...), or remove the key."
        )
    require_data_parallel()


def _output(recipe: Recipe, args: Any) -> None:
    """Require that ``training.output_dir`` is, or can be, a writable folder."""
    folder = Path(args.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise RecipeError(f"training.output_dir={args.output_dir}: {existing} is a file. Give a folder.")
    if not os.access(existing, os.W_OK | os.X_OK) or not _can_create_in(existing):
        raise RecipeError(
            f"training.output_dir={args.output_dir}: {existing} cannot be written to. Choose another folder."
        )


def _can_create_in(folder: Path) -> bool:
    """Create a folder and remove it: for root `os.access` is always true, even on a read-only file system."""
    try:
        Path(tempfile.mkdtemp(dir=folder)).rmdir()
    except OSError:
        return False
    return True


def _one_device(recipe: Recipe, args: Any) -> None:
    if args.n_gpu > 1 and recipe.model.device_map is None:
        raise RecipeError(
            f"one process sees {args.n_gpu} GPUs. Launch one per GPU (accelerate launch -m qwenvl_ft.train ...), or "
            "make only one visible: CUDA_VISIBLE_DEVICES=0."
        )


def require_saving_on_each_node(recipe: Recipe, args: Any) -> None:
    """Refuse ``training.save_on_each_node`` where transformers would save a model without its weights on other nodes.

    Since there is ``should_save_on_this_rank``, ``save_pretrained`` writes on rank 0 only; peft's writes on each node.
    """
    nodes = args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    ignored = hasattr(PreTrainedModel, "should_save_on_this_rank")
    if args.save_on_each_node and nodes > 1 and ignored and not METHODS[recipe.tuner.train_type].adapter:
        raise RecipeError(
            f"training.save_on_each_node=true: {installed(('transformers',))} writes the weights of a whole model on "
            "rank 0 only, so the other nodes would have checkpoints without weights. Remove it, and put "
            "training.output_dir on a disk that all nodes share, or copy the checkpoints to each node before a resume."
        )


def _batch_size(recipe: Recipe, args: Any) -> None:
    if args.auto_find_batch_size and (args.world_size > 1 or args.deepspeed is not None):
        raise RecipeError(
            "training.auto_find_batch_size=true is for one process without DeepSpeed: with several ranks, the one that "
            "runs out of memory would leave the others waiting. Set training.per_device_train_batch_size."
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
            f"training.push_to_hub=true, but the hub denies access: {type(error).__name__}: {cause} Log in with "
            "hf auth login, or remove the key."
        ) from error


def try_model(recipe: Recipe) -> None:
    """Check the recipe against the model's config.json: loading options, module names, maximum length.

    Call it before TrainingArguments are built: from then on transformers shards any model under ZeRO-3, even one
    without weights.

    Raises:
        RecipeError: names the key and value that do not fit the model.
        CheckpointError: there is no such model.
    """
    section = recipe.model
    if not section.model:
        return
    plan = plan_loading(section.model, loading_options(section, recipe.quantization))
    if plan.adapter is not None:
        raise RecipeError(
            f"model.model={section.model} is an adapter. To train it further, set model.model={plan.source} and "
            f"tuner.resume_from_checkpoint={section.model}; or merge it first (qwenvl-ft merge)."
        )
    if (size := recipe.training.sequence_parallel_size) > 1:
        require_model(plan.config, plan.attention, size)
    if any(recipe.training.arguments.get(key) for key in COMPILING):
        require_compilable(plan.config)
    if recipe.tuner.resume_from_checkpoint:
        require_saved_weights("tuner.resume_from_checkpoint", Path(recipe.tuner.resume_from_checkpoint).expanduser())
    earlier = Earlier.of(recipe.tuner)
    scaling = None if earlier is None else trained_lengths(earlier.folder)[0]
    if scaling is not None and section.rope_scaling is None:
        raise RecipeError(
            f"tuner.resume_from_checkpoint={recipe.tuner.resume_from_checkpoint} was trained with model.rope_scaling="
            f"{shown(scaling)}, but this recipe does not set it. Set it to the same value."
        )
    _names(recipe.tuner, plan.config)
    length, text = recipe.template.max_length, plan.config.get_text_config()
    if length <= text.max_position_embeddings:
        return
    dynamic = text.rope_parameters["rope_type"] == "dynamic"
    stretched = ", and dynamic scaling would stretch them for all samples of a row that contains a longer one"
    reason = stretched if dynamic else ""
    raise RecipeError(
        f"template.max_length={length} exceeds the {text.max_position_embeddings} positions (max_position_embeddings) "
        f"of {section.model}{reason}. Lower it, or stretch the positions by model.rope_scaling=yarn."
    )


def _names(tuner: Any, config: Any) -> None:
    """Check module names and sizes against the model; methods without such a check fail when they are built."""
    names = METHODS[tuner.train_type].names
    if names is not None:
        names(skeleton(copy.deepcopy(config)), tuner)


CHECKS = (
    _dense,
    _output,
    _one_device,
    _sharding,
    _shared_rows,
    require_saving_on_each_node,
    _batch_size,
    _trackers,
    _wandb,
    _optimizer,
    _liger,
    _hub,
    _compile,
    _tracker_trials,
)
