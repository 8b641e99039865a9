"""``qwenvl-ft show RECIPE|FILE ...``: writes an HTML page of what the model will see."""

from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.look import FIRST


def show(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILE...", help="A recipe or data files, then section.key=value.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("show.html"),
    samples: Annotated[int, typer.Option(help="Number of samples to show, spread over the data.", min=1)] = 8,
    rows: Annotated[int, typer.Option(help="Number of packed rows to show, from the start of the epoch.", min=0)] = 2,
    epoch: Annotated[int, typer.Option(help="Epoch, from 0, whose packing and augmentation are shown.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train, val, or val.NAME if there are several validation sets.")] = "train",
    records: Annotated[
        int, typer.Option(help="Of a stream (data.streaming), the most records of a window.", min=1)
    ] = FIRST,
    units: Annotated[
        str, typer.Option(help="Units of coordinates in answers: norm1000, norm100, unit (0 to 1), pixels, or auto.")
    ] = "auto",
) -> None:
    """Write one HTML page with images, objects, tokens and packed rows. Data files without a recipe need --model DIR.

    A recipe with phases gives one page per phase, for example show_phase_1_simple.html.
    """
    from qwenvl_ft.look.first_records import first_records_line
    from qwenvl_ft.look.placing import check_units
    from qwenvl_ft.look.selection import target_recipe
    from qwenvl_ft.look.show import show_recipe

    check_units(units)
    for phase, recipe in target_recipe(words).by_phase().items():
        page = out.with_stem(f"{out.stem}_{phase}") if phase else out
        if line := first_records_line(recipe, records):
            typer.echo(line)
        written = show_recipe(
            recipe,
            page,
            split=split,
            samples=samples,
            rows=rows,
            epoch=epoch,
            units=units,
            title=phase,
            records=records,
        )
        typer.echo(written)
