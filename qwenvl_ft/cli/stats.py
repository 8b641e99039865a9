"""``qwenvl-ft stats RECIPE|FILE ...``: prints statistics of the data."""

from pathlib import Path
from typing import Annotated

import typer

from qwenvl_ft.look import FIRST


def stats(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILE...", help="A recipe or data files, then section.key=value.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write an HTML page with plots to this file.")] = None,
    split: Annotated[str, typer.Option(help="train, val, or val.NAME if there are several validation sets.")] = "train",
    show: Annotated[int, typer.Option(help="Maximum number of entries per table.", min=0)] = 10,
    records: Annotated[
        int, typer.Option(help="Of a stream (data.streaming), the number of first records to look at.", min=1)
    ] = FIRST,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count tokens, images, answers and objects, and measure diversity. Tokens need a recipe or --model DIR."""
    import json

    from qwenvl_ft.look.first_records import first_records_line
    from qwenvl_ft.look.selection import target_recipe
    from qwenvl_ft.look.stats import count_recipe, text, write_page

    by_phase = {}
    for phase, recipe in target_recipe(words).by_phase().items():
        if line := first_records_line(recipe, records):
            typer.echo(line, err=as_json)
        counted = count_recipe(recipe, split=split, quiet=as_json, records=records)
        by_phase[phase] = counted.to_json()
        if not as_json:
            typer.echo((f"\n{phase}\n" if phase else "") + text(counted, show))
        if out is not None:
            page = out.with_stem(f"{out.stem}_{phase}") if phase else out
            write_page(counted, page)
            typer.echo(f"\nplots: {page}", err=as_json)
    if as_json:
        typer.echo(json.dumps(by_phase[""] if "" in by_phase else by_phase, ensure_ascii=False))
