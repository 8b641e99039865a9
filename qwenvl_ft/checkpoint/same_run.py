"""Does the checkpoint belong to this run? Compares recipes and plans before anything is loaded.

The optimizer's state fits only the same method and parameters, and the step number only the same plan: with another one
a resumed run would silently skip records or take them twice.
"""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.checkpoint.manifest import read
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown

PLAN = "plan.json"
"""File in a checkpoint that identifies the plan in which its step was counted."""
KEPT_SECTIONS = ("template", "prompts", "tuner", "quantization")
"""Sections that must not change at all."""
KEPT_KEYS = {
    "model": ("rope_scaling",),
    "data": (
        "streaming",
        "stream_window",
        "train_dataset_sample",
        "train_dataset_mix_ratio",
        "images_per_user_turn",
        "emit_norm",
        "summary_ratio",
        "label_pattern",
        "object_pattern",
        "object_order",
        "augmentation",
    ),
    "training": (
        "seed",
        "data_seed",
        "train_sampling_strategy",
        "packing",
        "padding_free",
        "optimizer",
        "optim",
        "optim_args",
        "learning_rate",
        "vit_lr",
        "aligner_lr",
        "lorap_lr_ratio",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "use_galore",
        "lisa_activated_layers",
        "lisa_step_interval",
    ),
}
"""Section -> its keys that must not change; learning rates are part of the optimizer's state."""
ENGINES = {
    "DeepSpeed ZeRO-3": ("global_step*/*zero_pp_rank_*_model_states.pt",),
    "DeepSpeed": ("global_step*",),
    "FSDP": ("pytorch_model_fsdp*", "optimizer_0", "optimizer.bin"),
}
"""What shards a run -> files of its checkpoints; the first match counts. Without a match it was not sharded."""
NOT_SHARDED = "no sharding"
MAX_NAMED = 3
"""Number of differences that an error names."""


def require_same_recipe(recipe: Recipe, checkpoint: Path) -> None:
    """Raise if a setting that the checkpoint's state depends on has changed.

    Keys that only one of the two recipes has, as after an upgrade, are ignored.

    Raises:
        CheckpointError: names the keys with their values now and before.
    """
    before, now = saved_recipe(checkpoint), json.loads(json.dumps(recipe.to_dict(), default=str))
    keys = [(section, key) for section in KEPT_SECTIONS for key in now.get(section) or {}]
    keys += [(section, key) for section, names in KEPT_KEYS.items() for key in names]
    changed = [
        f"{section}.{key} is {shown(now[section][key])} and was {shown(before[section][key])}"
        for section, key in keys
        if key in (before.get(section) or {}) and key in now[section] and now[section][key] != before[section][key]
    ]
    if changed:
        more = f", and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
        raise CheckpointError(
            f"training.resume_from_checkpoint={checkpoint}: {', '.join(changed[:MAX_NAMED])}{more}. A resumed run "
            "must keep them: set them back, or start a new run in another training.output_dir."
        )


def plan_of(sampler: Any) -> dict[str, Any]:
    """Return the identity of a plan: number and lengths of its samples, rows of an optimizer step, a stream's data."""
    dataset, shape = sampler.dataset, sampler.shape
    key = dataset.at(dataset.present).key()
    return {
        "samples": key.samples,
        "lengths": key.lengths,
        "data": dataset.identity(dataset.present),
        "rows_per_step": shape.rows_per_pass * shape.accumulation,
    }


def save_plan(sampler: Any, folder: Path) -> None:
    """Write `plan_of` into a checkpoint."""
    (folder / PLAN).write_text(json.dumps(plan_of(sampler)) + "\n", encoding="utf-8")


def require_same_plan(sampler: Any, checkpoint: Path, *, any_rows: bool = False) -> None:
    """Raise if the checkpoint's step number would point to a different position in this run's data.

    Args:
        any_rows: ignore the number of rows, which ``auto_find_batch_size`` takes from the checkpoint.

    Raises:
        CheckpointError: the samples, the records of a stream's window or the number of rows of a step differ.
    """
    path = checkpoint / PLAN
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), plan_of(sampler)
    prefix = f"training.resume_from_checkpoint={checkpoint}: "
    if before["rows_per_step"] != now["rows_per_step"] and not any_rows:
        raise CheckpointError(
            f"{prefix}a step takes {now['rows_per_step']} rows and took {before['rows_per_step']}. Keep "
            "training.per_device_train_batch_size * gradient_accumulation_steps * processes / sequence_parallel_size."
        )
    if (before["samples"], before["lengths"]) != (now["samples"], now["lengths"]):
        raise CheckpointError(
            f"{prefix}data.train has {now['samples']:,} samples and had {before['samples']:,}"
            + (", with different lengths" if before["samples"] == now["samples"] else "")
            + ". Give the data that the run began with, or start a new run in another training.output_dir."
        )
    if before.get("data", now["data"]) != now["data"]:  # a checkpoint of an earlier release says nothing
        raise CheckpointError(
            f"{prefix}the window that it stands in has as many records of the same lengths, but other ones: a shard of "
            "the stream has changed, or the saved position. Put the original shards back, or start a new run in "
            "another training.output_dir."
        )


def processes_of(checkpoint: Path) -> int:
    """Return the number of processes that saved a checkpoint."""
    manifest = read(checkpoint)
    return manifest["processes"] if manifest is not None else max(1, len(list(checkpoint.glob("rng_state_*.pth"))))


def require_same_engine(checkpoint: Path, engine: str, processes: int) -> None:
    """Raise if this run cannot read the optimizer's state of a checkpoint, as far as that depends on its sharding.

    Without sharding any number of processes reads it. DeepSpeed reads only what as many processes wrote.

    Args:
        engine: a key of `ENGINES`, or `NOT_SHARDED`.

    Raises:
        CheckpointError: it was saved with another engine, or by DeepSpeed with another number of processes.
    """
    known = (name for name, patterns in ENGINES.items() if any(any(checkpoint.glob(p)) for p in patterns))
    before, saved = next(known, NOT_SHARDED), processes_of(checkpoint)
    if before != engine:
        problem, fix = f"it was saved with {before}, and this run has {engine}", f"Resume it with {before}"
    elif engine.startswith("DeepSpeed") and saved != processes:
        problem = f"DeepSpeed saved it from {saved} processes, and this run has {processes}"
        fix = f"Resume it with {saved}"
    else:
        return
    raise CheckpointError(
        f"training.resume_from_checkpoint={checkpoint}: {problem}. {fix}, or start a new run from its weights with "
        "training.resume_weights_only=true and another training.output_dir."
    )
