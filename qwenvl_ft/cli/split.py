"""``qwenvl-ft split FILE``: splits dense captions by complexity."""

from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.errors import RecipeError


def split(
    file: Annotated[Path, typer.Argument(help="A .jsonl file of dense-caption records.")],
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RANGE",
            help="A level such as few=1-3 or many=9-. May be repeated. Default: simple, medium, full.",
        ),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Measure of complexity: number of objects, points or classes.")
    ] = "objects",
    out: Annotated[Path | None, typer.Option(help="Output folder; default is the folder of FILE.")] = None,
) -> None:
    """Write NAME.LEVEL.jsonl for each level, to train from simple records to full ones."""
    from qwenvl_ft.data.dense.complexity import LEVELS, REST, split_by_complexity

    entries = [entry.partition("=") for entry in level or []]
    if wrong := [name for name, equals, _ in entries if not equals]:
        raise RecipeError(f"--level {wrong[0]!r} is not NAME=RANGE. Example: --level simple=1-3.")
    levels = {name: text for name, _, text in entries} or LEVELS
    counts = split_by_complexity(file, out, levels=levels, measure=measure)
    for name, count in counts.items():
        where = "in none of them" if name == REST else str((out or file.parent) / f"{file.stem}.{name}.jsonl")
        typer.echo(f"{name:<10} {count:>9,} records  {where}")
