"""``qwenvl-ft check RECIPE|FILE ...``: checks every record before training."""

from typing import Annotated

import typer

from qwenvl_ft.look import FIRST


def check(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILE...", help="A recipe or data files, then section.key=value.")
    ],
    allow: Annotated[
        list[str] | None, typer.Option(help="A fault to accept, for example duplicate. May be repeated.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    show: Annotated[int, typer.Option(help="Examples to print of each fault.")] = 3,
    processes: Annotated[int, typer.Option(help="GPUs of the planned run, to compute its steps.")] = 1,
    records: Annotated[
        int, typer.Option(help="Of a stream (data.streaming), the number of first records to look at.", min=1)
    ] = FIRST,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all cases.")] = False,
) -> None:
    """Check every record before training. The exit code is 0, or 1 if something is wrong; the last lines say so.

    For data files without a recipe, lengths in tokens need --model DIR, and --val FILE finds records that are also in
    the training data. In a recipe with phases, the data of every phase is checked.
    """
    import json

    from qwenvl_ft.look.check import check_recipe
    from qwenvl_ft.look.check_report import closing, text
    from qwenvl_ft.look.first_records import first_records_line
    from qwenvl_ft.look.selection import target_recipe

    reports = {}
    for phase, recipe in target_recipe(words).by_phase().items():
        if line := first_records_line(recipe, records):
            typer.echo(line, err=as_json)
        report = check_recipe(recipe, allow=allow or [], processes=processes, quiet=as_json, records=records)
        reports[phase] = report
        if not as_json:
            typer.echo((f"\n{phase}\n" if phase else "") + text(report, show))
    if as_json:
        by_phase = {phase: report.to_json(strict=strict) for phase, report in reports.items()}
        typer.echo(json.dumps(by_phase[""] if "" in by_phase else by_phase, ensure_ascii=False))
    else:
        typer.echo("\n".join(closing(reports.values(), strict=strict)))
    if any(report.exit_code(strict=strict) for report in reports.values()):
        raise typer.Exit(1)
