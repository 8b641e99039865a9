"""``qwenvl-ft recipe [NAME] [section.key=value ...]``: prints the resolved recipe and the origin of each value."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe in recipes/, or a file; without one, the flags alone.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, or flags of ms-swift and train_qwen.py.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print YAML without the origins.")] = False,
) -> None:
    """Print a resolved recipe, with the file, override or tool that set each value."""
    from qwenvl_ft.data.augment.pipeline import Augmenter
    from qwenvl_ft.data.dense.options import DenseOptions
    from qwenvl_ft.recipe.argv import ASSIGNMENT, recipe_from_argv

    is_recipe = not name.startswith("--") and (ASSIGNMENT.match(name) is None or Path(name).exists())
    resolved = recipe_from_argv([f"recipe={name}" if is_recipe else name, *(overrides or [])])
    for run in resolved.by_phase().values():
        DenseOptions.of(run, seed=0)  # these two check what the types of the schema cannot
        Augmenter.from_config(run.data.augmentation)
    if plain:
        typer.echo(resolved.to_yaml(), nl=False)
        return
    sections = resolved.to_dict()
    phases = sections.pop("phases", [])
    rows = [(key, as_text(value), resolved.origin(key)) for key, value in flatten(sections)]
    for phase, run in zip(phases, resolved.phases, strict=True):
        name = phase.pop("name")
        rows += [(f"phases.{name}.{key}", as_text(value), run.origin(key)) for key, value in flatten(phase)]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(44, max(len(value) for _, value, _ in rows))
    for key, value, origin in rows:
        typer.echo(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted key and value of every leaf; an empty mapping is a leaf."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += flatten(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return rows


def as_text(value: Any) -> str:
    """Return a value on one line, as it is written in a recipe."""
    plain = isinstance(value, str) and value != "" and value == " ".join(value.split())
    return value if plain else json.dumps(value, ensure_ascii=False)
