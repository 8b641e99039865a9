"""``qwenvl-ft show RECIPE``: a page of what the model will see."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILE...", help="A recipe, or data files; then section.key=value.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("show.html"),
    samples: Annotated[int, typer.Option(help="Samples to show, from all over the data.", min=1)] = 8,
    rows: Annotated[int, typer.Option(help="Rows to show, the first of the epoch.", min=0)] = 2,
    epoch: Annotated[int, typer.Option(help="Whose plan (and augmentation), from 0.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train, val, or val.NAME of several.")] = "train",
    units: Annotated[
        str, typer.Option(help="Of coordinates in answers: norm1000, norm100, unit (0 to 1), pixels, or auto.")
    ] = "auto",
) -> None:
    """Write one HTML page with images, objects, tokens and packed rows. Files alone need --model DIR.

    Of a recipe with phases, each has its page: show_phase_1_simple.html.
    """
    from qwenvl_ft.look.placing import check_units
    from qwenvl_ft.look.selection import target_recipe
    from qwenvl_ft.look.show import show_recipe

    check_units(units)
    for phase, recipe in target_recipe(words).by_phase().items():
        page = out.with_stem(f"{out.stem}_{phase}") if phase else out
        told = show_recipe(recipe, page, split=split, samples=samples, rows=rows, epoch=epoch, units=units, title=phase)
        typer.echo(told)
