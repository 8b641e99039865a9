"""Turns the recipe of a run into the recipe of a proof: few samples, few steps, nothing kept."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.recipe.argv import ASSIGNMENT, recipe_from_argv
from qwenvl_ft.recipe.schema import Recipe

SKIPPABLE = ("packed", "split", "frozen", "saved", "merged")
"""Names of checks, as ``--skip`` takes them."""


@dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """Size of a proof."""

    samples: int = 5
    """Number of samples; each is run several times."""
    max_tokens: int = 4096
    """Maximum number of tokens over all samples; short records are chosen first."""
    steps: int = 3
    """Training steps before anything is compared."""
    new_tokens: int = 16
    """Tokens generated per answer."""
    skip: Sequence[str] = field(default_factory=tuple)
    """Checks to skip."""
    folder: Path | None = None
    """Folder in which the temporary folder is created; None is the system's default."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("max_tokens", 1), ("steps", 1), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)} is too few. Use {least} or more.")
        for name in self.skip:
            if name not in SKIPPABLE:
                raise unknown_name("check to skip", name, SKIPPABLE)
        if self.folder is not None and not self.folder.is_dir():
            raise RecipeError(f"--folder {self.folder} is not a folder. Create it first.")


def recipe_from_words(words: Sequence[str], *, data: Sequence[str] = (), tuner: str | None = None) -> Recipe:
    """Return the recipe that a command line describes, as for ``check``, but data is optional.

    Args:
        data: files or registered names for ``data.train``.
        tuner: value of ``tuner.train_type``.

    Raises:
        RecipeError: no model is named, or an override is wrong.
    """
    more = [f"data.train={json.dumps(list(data))}"] if data else []
    more += [f"tuner.train_type={tuner}"] if tuner else []
    named = bool(words) and not words[0].startswith("--") and ASSIGNMENT.match(words[0]) is None
    recipe = target_recipe([*words, *more]) if named else recipe_from_argv([*words, *more])
    if not recipe.model.model and not recipe.phases:
        raise RecipeError("name a model or a recipe. Example: qwenvl-ft prove --model Qwen/Qwen3-VL-4B-Instruct.")
    return recipe


def first_phase(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe to verify (the first phase, if there are phases) and a line for each part left out."""
    left_out = []
    if recipe.phases:
        recipe = recipe.phases[0]
        left_out.append(f"only phase {recipe.phase} of the recipe is verified")
    if recipe.deepspeed.enabled:
        left_out.append("DeepSpeed is switched off: the proof runs in one process on one device")
    if (size := recipe.training.sequence_parallel_size) > 1:
        left_out.append(f"training.sequence_parallel_size={size} is left out: the proof runs in one process")
    return recipe, left_out


def proof_recipe(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """Return a copy that trains ``steps`` steps on one device and writes into ``folder`` only.

    Everything random, and every extra term of the loss, is off so that figures can be compared: noise, dropout
    (`still`), label smoothing, weights of data sets, AdaLoRA's penalty. The learning rate is constant, because a
    warm-up begins at zero.
    """
    proof = copy.deepcopy(recipe)
    proof.deepspeed.enabled = False
    proof.data.val, proof.data.split_dataset_ratio, proof.data.loss_weights = None, 0.0, {}
    proof.data.on_error, proof.data.check_dataset_strategy = "raise", "none"
    proof.evaluation.run_after_training = False
    proof.training.z_loss, proof.training.early_stopping_patience = 0.0, None
    proof.training.resume_from_checkpoint, proof.training.resume_weights_only = None, False
    proof.training.sequence_parallel_size = 1
    proof.training.padding_free = True
    if proof.tuner.train_type == "adalora":
        proof.tuner.adalora_tinit = proof.tuner.adalora_tfinal = 0
        proof.tuner.adalora_orth_reg_weight = 0.0
    for name in DROPPED:
        proof.training.arguments.pop(name, None)
    proof.training.arguments |= ARGUMENTS | {"output_dir": str(folder), "max_steps": steps}
    return proof


DROPPED = (
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "label_smoothing_factor",
    "eval_steps",
    "train_sampling_strategy",
    "ddp_backend",
    "fsdp",
    "fsdp_config",
    "parallelism_config",
)
"""Fields of TrainingArguments that are reset to their defaults."""
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "logging_first_step": True,
    "disable_tqdm": True,
    "push_to_hub": False,
    "auto_find_batch_size": False,
}
"""Fields of TrainingArguments that a proof sets."""
