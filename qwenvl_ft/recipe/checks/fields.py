"""Fields of TrainingArguments that would have no effect."""

from itertools import chain

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.refused import fixed_fields, unread_keys
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown

NEEDS = {
    "hub_model_id": "push_to_hub",
    "hub_always_push": "push_to_hub",
    "hub_private_repo": "push_to_hub",
    "hub_revision": "push_to_hub",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
}
"""Field of ``training`` -> the field without which it has no effect."""


def output_dir(recipe: Recipe) -> str | None:
    """The output folder must have a name."""
    if not argument(recipe, "output_dir").strip():
        return "training.output_dir is empty. Name a folder: training.output_dir=output."
    return None


def without_effect(recipe: Recipe) -> str | None:
    """Fields that our training does not read, or can only do in one way."""
    values = recipe.training.arguments | {"lazy_tokenize": recipe.training.lazy_tokenize}
    return next(chain(fixed_fields(values, recipe.origins), unread_keys(values)), None)


def needs_another_field(recipe: Recipe) -> str | None:
    """Fields that are read only if another one is set."""
    for name, needed in NEEDS.items():
        value = argument(recipe, name)
        if value and not argument(recipe, needed):
            return (
                f"training.{name}={shown(value)} is only read if training.{needed} is set. Set that, or remove "
                f"training.{name}."
            )
    return None
