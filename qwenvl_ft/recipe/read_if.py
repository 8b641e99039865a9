"""With which other settings is a key read? The table of the keys that not every run reads: `READ_IF`.

A key without an entry is read by every run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.methods import METHODS, WITH_LORA, readers
from qwenvl_ft.recipe.schema import MIN_LR_SCHEDULES, Recipe

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules to which transformers does not pass the warmup."""
WITHOUT_ADAM_KEYS = (
    "sgd",
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "schedule_free_sgd",
)
"""Optimizers to which transformers passes neither ``adam_beta1`` and ``adam_beta2`` nor ``adam_epsilon``."""
WITHOUT_EPSILON = ("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit")
"""Optimizers to which it passes the betas alone."""
HUB = ("hub_model_id", "hub_strategy", "hub_always_push", "hub_private_repo", "hub_revision")
"""Fields that a push to the hub reads."""
PROJECTED = ("galore", "apollo")
"""Prefixes of the optimizers that project the gradients of chosen modules."""


@dataclass(frozen=True, kw_only=True)
class ReadIf:
    """The condition under which some keys are read."""

    keys: tuple[str, ...]
    """Dotted keys."""
    when: Callable[[Recipe], bool]
    """Recipe -> True if the run reads them."""
    by: tuple[str, ...]
    """Dotted keys that decide it. The message gives the value of the first."""
    fix: str
    """What else to set, for the message: ``set data.val``."""


def _section(name: str, *left_out: str) -> tuple[str, ...]:
    return tuple(f"{name}.{key}" for key in own_types(name) if key not in left_out)


def _training(*names: str) -> tuple[str, ...]:
    return tuple(f"training.{name}" for name in names)


def _tuner(prefix: str) -> tuple[str, ...]:
    return tuple(f"tuner.{name}" for name in own_types("tuner") if name.startswith(prefix))


def _is(name: str, *values: Any) -> Callable[[Recipe], bool]:
    """Return a condition: a field of TrainingArguments has one of these values."""
    return lambda recipe: argument(recipe, name) in values


def _reports_to(*trackers: str) -> Callable[[Recipe], bool]:
    """Return a condition: one of these trackers is on."""
    return lambda recipe: bool({"all", *trackers} & _trackers(recipe))


def _trackers(recipe: Recipe) -> set[str]:
    value = argument(recipe, "report_to")
    return set(value) if isinstance(value, list) else {value or "none"}


def _chooses_best(recipe: Recipe) -> bool:
    stops_early = recipe.training.early_stopping_patience is not None
    return bool(argument(recipe, "load_best_model_at_end") or stops_early or _is("save_strategy", "best")(recipe))


def _reads_save_steps(recipe: Recipe) -> bool:
    as_eval_steps = recipe.data.evaluates and argument(recipe, "eval_steps") == argument(recipe, "save_steps")
    return _is("save_strategy", "steps")(recipe) or (as_eval_steps and _is("eval_strategy", "steps")(recipe))


def _recomputes(recipe: Recipe) -> bool:
    section = recipe.training
    both = argument(recipe, "activation_checkpointing")
    return any(
        both if part is None else part
        for part in (section.llm_gradient_checkpointing, section.vit_gradient_checkpointing)
    )


def _reads_warmup(recipe: Recipe) -> bool:
    by_optimizer = str(argument(recipe, "optim")).startswith("schedule_free")
    is_wanted = argument(recipe, "warmup_steps") != 0
    return by_optimizer or not is_wanted or argument(recipe, "lr_scheduler_type") not in WITHOUT_WARMUP


def _reads_schedule_options(recipe: Recipe) -> bool:
    options = argument(recipe, "lr_scheduler_kwargs")
    return (
        not isinstance(options, dict) or "min_lr" not in options or _is("lr_scheduler_type", *MIN_LR_SCHEDULES)(recipe)
    )


def _uses_galore(recipe: Recipe) -> bool:
    return recipe.training.use_galore or recipe.training.optimizer == "galore"


def _method(key: str, listed: list[str]) -> ReadIf:
    return ReadIf(
        keys=(f"tuner.{key}",),
        when=lambda recipe: recipe.tuner.train_type in listed,
        by=("tuner.train_type",),
        fix=f"set tuner.train_type={listed[0]}",
    )


def _start(prefix: str, start: str) -> ReadIf:
    return ReadIf(
        keys=_tuner(prefix),
        when=lambda recipe: recipe.tuner.init_weights == start,
        by=("tuner.init_weights",),
        fix=f"set tuner.init_weights={start}",
    )


def _tracker(name: str, *keys: str) -> ReadIf:
    return ReadIf(
        keys=_training(*keys), when=_reports_to(name), by=("training.report_to",), fix=f"set training.report_to={name}"
    )


def _if_set(needed: str, *keys: str) -> ReadIf:
    """Return the condition of fields of TrainingArguments that are read if another one is set."""
    return ReadIf(
        keys=_training(*keys),
        when=lambda recipe: bool(argument(recipe, needed)),
        by=(f"training.{needed}",),
        fix=f"set training.{needed}",
    )


READ_IF: tuple[ReadIf, ...] = (
    *(_method(key, readers(key)) for key in own_types("tuner") if 0 < len(readers(key)) < len(METHODS)),
    _start("lora_ga_", "lora-ga"),
    _start("eva_", "eva"),
    ReadIf(
        keys=("tuner.unfreeze_topk_llm",),
        when=lambda recipe: recipe.tuner.freeze_llm,
        by=("tuner.freeze_llm",),
        fix="set tuner.freeze_llm=true",
    ),
    ReadIf(
        keys=("tuner.unfreeze_topk_vit",),
        when=lambda recipe: bool(recipe.tuner.freeze_vit),
        by=("tuner.freeze_vit",),
        fix="set tuner.freeze_vit=true",
    ),
    ReadIf(
        keys=("quantization.quantized_parts",),
        when=lambda recipe: recipe.quantization.quantization_bit is not None,
        by=("quantization.quantization_bit",),
        fix="set quantization.quantization_bit=4 or 8",
    ),
    ReadIf(
        keys=_section("quantization", "quantization_bit", "quantized_parts"),
        when=lambda recipe: recipe.quantization.quantization_bit == 4,
        by=("quantization.quantization_bit",),
        fix="set quantization.quantization_bit=4",
    ),
    ReadIf(
        keys=("model.max_memory",),
        when=lambda recipe: recipe.model.device_map is not None,
        by=("model.device_map", "deepspeed.enabled", "training.fsdp"),
        fix="set model.device_map=auto",
    ),
    ReadIf(
        keys=_section("deepspeed", "enabled"),
        when=lambda recipe: recipe.deepspeed.enabled,
        by=("deepspeed.enabled", "training.fsdp", "model.device_map"),
        fix="set deepspeed.enabled=true",
    ),
    ReadIf(
        keys=("data.val_dataset_sample",),
        when=lambda recipe: recipe.data.evaluates,
        by=("data.val", "data.split_dataset_ratio"),
        fix="set data.val",
    ),
    ReadIf(
        keys=("data.train_dataset_mix_ds",),
        when=lambda recipe: recipe.data.train_dataset_mix_ratio > 0,
        by=("data.train_dataset_mix_ratio",),
        fix="set data.train_dataset_mix_ratio",
    ),
    ReadIf(
        keys=("data.stream_window", "data.stream_rounds", "data.stream_cache"),
        when=lambda recipe: recipe.data.streaming,
        by=("data.streaming",),
        fix="set data.streaming=true",
    ),
    ReadIf(
        keys=("data.datasets_root",),
        when=lambda recipe: bool(recipe.data.datasets),
        by=("data.datasets",),
        fix="name data sets in data.datasets",
    ),
    ReadIf(
        keys=("data.max_bad_fraction",),
        when=lambda recipe: recipe.data.skips_unreadable,
        by=("data.on_error", "data.check_dataset_strategy"),
        fix="set data.on_error=skip",
    ),
    ReadIf(
        keys=_section("evaluation", "run_after_training", "run_during_training"),
        when=lambda recipe: recipe.evaluation.asks,
        by=("evaluation.run_after_training", "evaluation.run_during_training"),
        fix="set evaluation.run_after_training=true",
    ),
    ReadIf(
        keys=_training("eval_steps", "eval_delay"),
        when=lambda recipe: recipe.data.evaluates,
        by=("data.val", "data.split_dataset_ratio"),
        fix="set data.val",
    ),
    ReadIf(
        keys=_training("eval_steps"),
        when=_is("eval_strategy", "steps"),
        by=("training.eval_strategy",),
        fix="set training.eval_strategy=steps",
    ),
    ReadIf(
        keys=_training("eval_delay"),
        when=_is("eval_strategy", "steps", "epoch"),
        by=("training.eval_strategy",),
        fix="set training.eval_strategy=steps",
    ),
    ReadIf(
        keys=_training("metric_for_best_model", "greater_is_better"),
        when=_chooses_best,
        by=("training.load_best_model_at_end", "training.save_strategy", "training.early_stopping_patience"),
        fix="set training.load_best_model_at_end=true",
    ),
    ReadIf(
        keys=_training("save_steps"),
        when=_reads_save_steps,
        by=("training.save_strategy",),
        fix="set training.save_strategy=steps",
    ),
    ReadIf(
        keys=_training("save_total_limit", "save_only_model"),
        when=lambda recipe: argument(recipe, "save_strategy") != "no",
        by=("training.save_strategy",),
        fix="set training.save_strategy=steps",
    ),
    ReadIf(
        keys=_training("logging_steps"),
        when=_is("logging_strategy", None, "steps"),
        by=("training.logging_strategy",),
        fix="set training.logging_strategy=steps",
    ),
    ReadIf(
        keys=_training("warmup_steps"),
        when=_reads_warmup,
        by=("training.lr_scheduler_type",),
        fix="set training.lr_scheduler_type=constant_with_warmup",
    ),
    ReadIf(
        keys=_training("lr_scheduler_kwargs"),
        when=_reads_schedule_options,
        by=("training.lr_scheduler_type",),
        fix="set training.lr_scheduler_type=cosine_warmup_with_min_lr",
    ),
    ReadIf(
        keys=_training("adam_beta1", "adam_beta2", "adam_epsilon"),
        when=lambda recipe: argument(recipe, "optim") not in WITHOUT_ADAM_KEYS and not _uses_galore(recipe),
        by=("training.optim", "training.use_galore", "training.optimizer"),
        fix="set training.optim=adamw_torch_fused without GaLore",
    ),
    ReadIf(
        keys=_training("adam_epsilon"),
        when=lambda recipe: argument(recipe, "optim") not in WITHOUT_EPSILON,
        by=("training.optim",),
        fix="set training.optim=adamw_torch_fused",
    ),
    ReadIf(
        keys=_training("optim_target_modules"),
        when=lambda recipe: str(argument(recipe, "optim")).startswith(PROJECTED) or _uses_galore(recipe),
        by=("training.optim",),
        fix="set training.optim=galore_adamw or apollo_adamw",
    ),
    ReadIf(
        keys=tuple(f"training.{name}" for name in own_types("training") if name.startswith("galore_")),
        when=_uses_galore,
        by=("training.use_galore", "training.optimizer"),
        fix="set training.use_galore=true",
    ),
    ReadIf(
        keys=_training("lorap_lr_ratio"),
        when=lambda recipe: recipe.tuner.train_type in WITH_LORA,
        by=("tuner.train_type",),
        fix="set tuner.train_type=lora",
    ),
    ReadIf(
        keys=_training("lisa_step_interval"),
        when=lambda recipe: recipe.training.lisa_activated_layers > 0,
        by=("training.lisa_activated_layers",),
        fix="set training.lisa_activated_layers",
    ),
    ReadIf(
        keys=_training("activation_checkpointing_kwargs"),
        when=_recomputes,
        by=("training.activation_checkpointing",),
        fix="set training.activation_checkpointing=true",
    ),
    ReadIf(
        keys=_training("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        when=lambda recipe: argument(recipe, "dataloader_num_workers") != 0,
        by=("training.dataloader_num_workers",),
        fix="set training.dataloader_num_workers=auto",
    ),
    _if_set("push_to_hub", *HUB),
    _if_set("fsdp", "fsdp_config", "parallelism_config"),
    _if_set("use_liger_kernel", "liger_kernel_config"),
    _tracker("tensorboard", "logging_dir"),
    _tracker("wandb", "wandb_project", "wandb_entity"),
    _tracker("swanlab", "swanlab_project", "swanlab_mode", "swanlab_token"),
    _tracker("trackio", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)
"""Keys that not every run reads. If a key has several entries, all of their conditions must hold.

``per_device_eval_batch_size``, ``run_name``, ``hub_token`` and the learning rates of frozen parts have none, because
the commands of other tools give them in any case. What only some records read (dense captions, videos) is not known
before the data."""
