"""Reads the DeepSpeed configuration of a recipe and checks it against the recipe keys that set the same things."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.load import recipe_folders
from qwenvl_ft.recipe.schema import DeepspeedConfig
from qwenvl_ft.recipe.values import shown

DECIDED_BY_RECIPE = {
    "optimizer": "training.optim and the learning rates of the parts",
    "scheduler": "training.lr_scheduler_type and warmup_steps",
}
"""Section that a DeepSpeed configuration must not have -> the recipe keys that set the same thing."""


def deepspeed_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that ``deepspeed.config`` gives: the name of a preset, a JSON file or a mapping.

    Raises:
        RecipeError: there is no such preset or file; it is not a JSON mapping; it has no ``gradient_clipping``, so that
            ``training.max_grad_norm`` would be ignored; or it has an optimizer or schedule of its own.
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
        raise RecipeError(f"deepspeed.config: {shown(config)} is not a mapping, as a DeepSpeed configuration must be.")
    if "gradient_clipping" not in config:
        raise RecipeError(
            'deepspeed.config has no "gradient_clipping", so DeepSpeed would not clip gradients and '
            'training.max_grad_norm would be ignored. Add "gradient_clipping": "auto".'
        )
    for section, keys in DECIDED_BY_RECIPE.items():
        if section in config:
            raise RecipeError(f'deepspeed.config has its own "{section}". Remove it: {keys} decide.')
    return config


def hierarchical(config: dict[str, Any], section: DeepspeedConfig) -> dict[str, Any]:
    """Add ``deepspeed.zero_hpz_partition_size`` to a configuration, if it is set (ZeRO++, arXiv 2306.10209).

    Raises:
        RecipeError: the configuration is not ZeRO-3, which alone shards the weights.
    """
    if section.zero_hpz_partition_size is None:
        return config
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        raise RecipeError(
            f"deepspeed.zero_hpz_partition_size={section.zero_hpz_partition_size} is for weights that are sharded, and "
            f"the stage is {zero.get('stage', 0)}. Set deepspeed.config=zero3, or remove it."
        )
    return config | {"zero_optimization": zero | {"zero_hpz_partition_size": section.zero_hpz_partition_size}}
