"""What a command looks at: a recipe, or data files by themselves, with the overrides that a recipe takes."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.data.sources.registry import parse_selection
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import ASSIGNMENT, recipe_from_argv
from qwenvl_ft.recipe.dialects import FILES
from qwenvl_ft.recipe.layers import SUFFIXES


def target_recipe(words: list[str]) -> Any:
    """A command line's recipe.

    ``mine training.packing=true`` is a recipe and what it is told. ``a.jsonl%50 b.json --model DIR`` are data files in
    a recipe that says nothing else. Files beside a recipe are looked at instead of its training data. A command line
    of training (``recipe=mine data.train=a.jsonl``) means what it means there.

    Raises:
        RecipeError: nothing is named, several recipes are, or what is told is wrong.
    """
    number = next((k for k, word in enumerate(words) if _is_told(word)), len(words))
    named, told = words[:number], words[number:]
    files = [word for word in named if _is_data(word)]
    recipes = [word for word in named if word not in files]
    if not named and told:
        recipe = recipe_from_argv(told)
        if recipe.data.train or any(word.partition("=")[0].lstrip("-") in FILES for word in told):
            return recipe
    if not named:
        raise RecipeError("name a recipe or data files first. Example: mine, or a.jsonl b.json.")
    if len(recipes) > 1:
        raise RecipeError(f"{' and '.join(recipes)} are several recipes. Name one; data files end in .jsonl or .json.")
    data = [f"data.train={json.dumps(files)}"] if files else []
    return recipe_from_argv([*(f"recipe={name}" for name in recipes), *data, *told])


def _is_told(word: str) -> bool:
    """Whether it is an override or a flag, not a name."""
    return word.startswith("--") or (ASSIGNMENT.match(word) is not None and not Path(word).exists())


def _is_data(word: str) -> bool:
    """Whether it is the path of data, with or without a rate: a file that is no recipe, or a folder or its split."""
    name = parse_selection([word])[0][0]
    folders = (name, name.rpartition(":")[0])
    return Path(name).suffix not in ("", *SUFFIXES) or any(folder and Path(folder).is_dir() for folder in folders)
