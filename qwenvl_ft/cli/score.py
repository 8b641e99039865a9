"""``qwenvl-ft score --metric NAME --data FILE``: scores a file of answers."""

from pathlib import Path
from typing import Annotated

import typer


def score(
    metric: Annotated[str, typer.Option(help="Metric, as evaluation.metric in a recipe.")],
    data: Annotated[
        Path,
        typer.Option(help="Lines of answer and reference; with --answers, training records or lines of reference."),
    ],
    answers: Annotated[
        Path | None, typer.Option(help="Lines of answers, in the order of --data, such as infer --json prints.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the metric, such as iou=0.3. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the answers in a .jsonl file with the expected ones, and print all scores of a metric."""
    import json

    from qwenvl_ft.errors import RecipeError
    from qwenvl_ft.evaluation.answer_files import read_answers
    from qwenvl_ft.evaluation.metrics import as_text, metric_of, one_line

    chosen = metric_of(metric, "--metric")
    given = dict(item.partition("=")[::2] for item in option or [])
    if unset := [name for name, value in given.items() if not value]:
        raise RecipeError(f"--option {unset[0]} has no value. Example: --option iou=0.3.")
    options = chosen.checked(given, "--option")
    pairs = read_answers(data, answers, metric)
    if pairs.sizes is not None and metric == "geometry":
        options["sizes"] = pairs.sizes
    scores = chosen.score(pairs.references, pairs.answers, **options)
    if as_json:
        typer.echo(json.dumps({"metric": metric, "primary": chosen.primary} | scores, ensure_ascii=False))
    else:
        typer.echo(f"{one_line(metric, scores)}\n\n{as_text(scores)}")
