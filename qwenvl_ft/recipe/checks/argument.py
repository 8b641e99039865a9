"""Reads a field of TrainingArguments from a recipe."""

from typing import Any

from qwenvl_ft.recipe.schema import Recipe


def argument(recipe: Recipe, name: str) -> Any:
    """Return a field of TrainingArguments; None if neither the recipe nor our defaults set it."""
    return recipe.training.arguments.get(name)
