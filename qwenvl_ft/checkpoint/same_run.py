"""What a run keeps when it goes on from a checkpoint, compared before anything is loaded.

The optimizer's state belongs to these weights, the step to this plan. A run that goes on with another plan leaves
records out or takes them twice, and says nothing.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown

PLAN = "plan.json"
"""Beside a checkpoint's weights: the plan that its step was counted in."""
WHOLE = ("template", "prompts", "tuner", "quantization")
"""Sections that stay as they were."""
KEPT = {
    "model": ("rope_scaling",),
    "data": (
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
"""Section -> its keys that stay as they were; rates are part of the optimizer's state."""
NAMED = 3
"""Differences that an error names."""


def require_same_recipe(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on with settings that the checkpoint's state was not made with.

    Keys that one of the two recipes does not have, as of an older release, are passed over.

    Raises:
        CheckpointError: names the keys, what they are and what they were.
    """
    before, now = saved_recipe(checkpoint), json.loads(json.dumps(recipe.to_dict(), default=str))
    keys = [(section, key) for section in WHOLE for key in now.get(section) or {}]
    keys += [(section, key) for section, names in KEPT.items() for key in names]
    changed = [
        f"{section}.{key} is {shown(now[section][key])} and was {shown(before[section][key])}"
        for section, key in keys
        if key in (before.get(section) or {}) and key in now[section] and now[section][key] != before[section][key]
    ]
    if changed:
        more = f", and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise CheckpointError(
            f"training.resume_from_checkpoint={checkpoint}: {', '.join(changed[:NAMED])}{more}. A run goes on as it "
            "was begun: set it back, or begin a new run in another training.output_dir."
        )


def plan_of(sampler: Any) -> dict[str, Any]:
    """What a step number means: the samples, how long they are, and the rows that a step takes."""
    lengths = sampler.dataset.at(0).tokens
    shape = sampler.shape
    return {
        "samples": len(lengths),
        "lengths": xxhash.xxh64(lengths.astype("int64").tobytes()).hexdigest(),
        "rows_per_step": shape.rows_per_pass * shape.accumulation,
    }


def save_plan(sampler: Any, folder: Path) -> None:
    """Write `plan_of` beside a checkpoint's weights."""
    (folder / PLAN).write_text(json.dumps(plan_of(sampler)) + "\n", encoding="utf-8")


def require_same_plan(sampler: Any, checkpoint: Path, *, any_rows: bool = False) -> None:
    """Refuse to go on where the checkpoint's step would be another place in the data.

    Args:
        any_rows: the number of rows was found by trial (``auto_find_batch_size``) and comes from the checkpoint.

    Raises:
        CheckpointError: other records, or another number of rows a step.
    """
    path = checkpoint / PLAN
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), plan_of(sampler)
    start = f"training.resume_from_checkpoint={checkpoint}: "
    if before["rows_per_step"] != now["rows_per_step"] and not any_rows:
        raise CheckpointError(
            f"{start}a step takes {now['rows_per_step']} rows and took {before['rows_per_step']}. Let processes x "
            "training.per_device_train_batch_size x gradient_accumulation_steps be what it was."
        )
    if (before["samples"], before["lengths"]) != (now["samples"], now["lengths"]):
        raise CheckpointError(
            f"{start}data.train has {now['samples']:,} samples and had {before['samples']:,}"
            + (", of other lengths" if before["samples"] == now["samples"] else "")
            + ". Give the data that the run was begun with, or begin a new run in another training.output_dir."
        )
