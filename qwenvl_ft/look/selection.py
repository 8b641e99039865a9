"""Reads what a command is to inspect: a recipe, or data files by themselves, plus overrides."""

import json
from pathlib import Path

from qwenvl_ft.data.sources.registry import parse_selection
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import ASSIGNMENT, recipe_from_argv
from qwenvl_ft.recipe.dialects import FILES
from qwenvl_ft.recipe.layers import SUFFIXES
from qwenvl_ft.recipe.schema import Recipe


def target_recipe(words: list[str]) -> Recipe:
    """Return the recipe that a command line describes.

    ``mine training.packing=true`` is a recipe with an override. ``a.jsonl%50 b.json --model DIR`` are data files under
    an otherwise empty recipe. Files after a recipe replace its training data. A training command line
    (``recipe=mine data.train=a.jsonl``) keeps its meaning.

    Raises:
        RecipeError: no recipe or file is named, several recipes are, or an override is wrong.
    """
    number = next((k for k, word in enumerate(words) if _is_override(word)), len(words))
    named, overrides = words[:number], words[number:]
    files = [word for word in named if _is_data(word)]
    recipes = [word for word in named if word not in files]
    if not named and overrides:
        recipe = recipe_from_argv(overrides)
        if recipe.data.train or any(word.partition("=")[0].lstrip("-") in FILES for word in overrides):
            return recipe
    if not named:
        raise RecipeError("name a recipe or data files first. Example: mine, or a.jsonl b.json.")
    if len(recipes) > 1:
        raise RecipeError(f"{' and '.join(recipes)} are several recipes. Name one; data files end in .jsonl or .json.")
    data = [f"data.train={json.dumps(files)}"] if files else []
    return recipe_from_argv([*(f"recipe={name}" for name in recipes), *data, *overrides])


def _is_override(word: str) -> bool:
    """Return True for an override or a flag, False for a name."""
    return word.startswith("--") or (ASSIGNMENT.match(word) is not None and not Path(word).exists())


def _is_data(word: str) -> bool:
    """Return True for a data path, with or without a rate: a file that is not a recipe, a folder, or a folder's
    split."""
    name = parse_selection([word])[0][0]
    folders = (name, name.rpartition(":")[0])
    return Path(name).suffix not in ("", *SUFFIXES) or any(folder and Path(folder).is_dir() for folder in folders)
