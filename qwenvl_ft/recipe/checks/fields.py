"""Fields of TrainingArguments that would have no effect."""

from itertools import chain

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.refused import fixed_fields, unread_keys
from qwenvl_ft.recipe.schema import Recipe


def output_dir(recipe: Recipe) -> str | None:
    """The output folder must have a name."""
    if not argument(recipe, "output_dir").strip():
        return "training.output_dir is empty. Name a folder: training.output_dir=output."
    return None


def without_effect(recipe: Recipe) -> str | None:
    """Fields that our training does not read, or can only do in one way."""
    values = recipe.training.arguments | {"lazy_tokenize": recipe.training.lazy_tokenize}
    return next(chain(fixed_fields(values, recipe.origins), unread_keys(values)), None)
