"""``qwenvl-ft prove``: the promises, proven on this model, data, method, device and these versions."""

from pathlib import Path
from typing import Annotated

import typer


def prove(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]", help="A recipe; then section.key=value. Or --model DIR.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Records, as data.train; without, some are made up. May be repeated.")
    ] = None,
    tuner: Annotated[str | None, typer.Option(help="As tuner.train_type: lora, full, reft, ...")] = None,
    samples: Annotated[int, typer.Option(help="Samples that are compared.")] = 5,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of all samples together.")] = 4096,
    steps: Annotated[int, typer.Option(help="Training steps before anything is compared.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each generated answer.")] = 16,
    skip: Annotated[
        list[str] | None, typer.Option(help="packed, split, frozen, saved or merged; may be given several times.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary folder is made.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a few steps, and compare: packed with alone, split with whole, frozen and saved weights.

    Exit code 0 if all of it holds, 1 if not. Run it the first time in an environment, after an upgrade, and before a
    long run.
    """
    import json

    from qwenvl_ft.prove.proof_recipe import ProofOptions, recipe_from_words

    options = ProofOptions(
        samples=samples,
        max_tokens=max_tokens,
        steps=steps,
        new_tokens=new_tokens,
        skip=tuple(skip or ()),
        folder=folder,
    )
    recipe = recipe_from_words(words or [], data=data or [], tuner=tuner)
    if recipe.model.device_map is None:
        show_one_gpu()
    from transformers.utils import logging

    from qwenvl_ft.prove.run import prove as proof

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = proof(recipe, options, say=lambda line: typer.echo(f"... {line}", err=True))
    typer.echo(json.dumps(report.to_json(), ensure_ascii=False) if as_json else report.text())
    if not report.ok:
        raise typer.Exit(1)


def show_one_gpu() -> None:
    """Let this process see its first GPU only, before torch looks: a proof runs on one."""
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
