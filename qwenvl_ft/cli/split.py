"""``qwenvl-ft split FILE``: dense captions parted by how much they hold."""

from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.errors import RecipeError


def split(
    file: Annotated[Path, typer.Argument(help="A .jsonl of dense-caption records.")],
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RANGE", help="As few=1-3 or many=9-; again for more. Default: simple, medium, full."
        ),
    ] = None,
    measure: Annotated[str, typer.Option(help="What is counted: objects, points or classes.")] = "objects",
    out: Annotated[Path | None, typer.Option(help="Folder of the files; beside FILE if not given.")] = None,
) -> None:
    """Write NAME.LEVEL.jsonl for each level, to train from the simple to the full."""
    from qwenvl_ft.data.dense.complexity import LEVELS, REST, split_by_complexity

    told = [entry.partition("=") for entry in level or []]
    if wrong := [name for name, equals, _ in told if not equals]:
        raise RecipeError(f"--level {wrong[0]!r} is not NAME=RANGE. Example: --level simple=1-3.")
    levels = {name: text for name, _, text in told} or LEVELS
    counts = split_by_complexity(file, out, levels=levels, measure=measure)
    for name, count in counts.items():
        where = "in none of them" if name == REST else str((out or file.parent) / f"{file.stem}.{name}.jsonl")
        typer.echo(f"{name:<10} {count:>9,} records  {where}")
