"""``qwenvl-ft check RECIPE`` or ``FILE ...``: is the data fit to train on?"""

from typing import Annotated

import typer


def check(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILE...", help="A recipe, or data files; then section.key=value.")
    ],
    allow: Annotated[
        list[str] | None, typer.Option(help="A reason that is no error here, as duplicate; may be given several times.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    show: Annotated[int, typer.Option(help="Cases of each reason that are printed.")] = 3,
    processes: Annotated[int, typer.Option(help="GPUs of the run to come, for its steps.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every case.")] = False,
) -> None:
    """Look at every record before training does. Exit code 0, or 1 if something is wrong.

    Files alone are checked for all but tokens; give --model DIR for those too, --val FILE to look for leaks. Of a
    recipe with phases, each is looked at.
    """
    import json

    from qwenvl_ft.look.check import check_recipe
    from qwenvl_ft.look.check_report import text
    from qwenvl_ft.look.selection import target_recipe

    reports = {}
    for phase, recipe in target_recipe(words).by_phase().items():
        report = check_recipe(recipe, allow=allow or [], processes=processes, quiet=as_json)
        reports[phase] = report
        if not as_json:
            typer.echo((f"\n{phase}\n" if phase else "") + text(report, show))
    if as_json:
        told = {phase: report.to_json() for phase, report in reports.items()}
        typer.echo(json.dumps(told[""] if "" in told else told, ensure_ascii=False))
    if not all(report.ok and not (strict and report.faults) for report in reports.values()):
        raise typer.Exit(1)
