"""`qwenvl-ft recipe NAME [section.key=value ...]`: the resolved recipe, and the origin of each value."""

from typing import Annotated, Any

import typer

from qwenvl_ft.recipe.load import as_text, load_recipe


def recipe(
    name: Annotated[str, typer.Argument(help="name in recipes/, or a file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="YAML alone, without the origins")] = False,
) -> None:
    """Print a resolved recipe."""
    resolved = load_recipe(name, overrides or [])
    if plain:
        import yaml

        print(yaml.safe_dump(resolved.to_dict(), sort_keys=False, allow_unicode=True), end="")
        return
    rows = flatten(resolved.to_dict())
    key_width = max(len(key) for key, _ in rows)
    value_width = min(44, max(len(as_text(value)) for _, value in rows))
    for key, value in rows:
        print(f"{key:<{key_width}}  {as_text(value):<{value_width}}  {resolved.origins.get(key, 'default')}")


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of every leaf; an empty mapping is a leaf."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += flatten(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return rows
