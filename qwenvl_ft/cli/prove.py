"""``qwenvl-ft prove``: tests the promises with this model, data, method, device and installed versions."""

from pathlib import Path
from typing import Annotated

import typer


def prove(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]", help="A recipe, then section.key=value; or --model DIR.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Records, written as in data.train; generated ones if not given. May be repeated."),
    ] = None,
    tuner: Annotated[
        str | None, typer.Option(help="Training method, as tuner.train_type: lora, full, reft, ...")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of samples to compare.")] = 5,
    max_tokens: Annotated[int, typer.Option(help="Maximum total length of the samples, in tokens.")] = 4096,
    steps: Annotated[int, typer.Option(help="Number of training steps before the comparison.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Length of each generated answer, in tokens.")] = 16,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out packed, split, frozen, saved or merged. May be repeated.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Parent of the temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a few steps, then compare packed with single samples, split with whole batches, saved with trained weights.

    Exit code: 0 if all promises hold, 1 if one does not, 2 if a setting, the model or the data is wrong. Run it first
    in a new environment, after an upgrade, and before a long run.
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
    """Hide all GPUs but the first from this process, before torch is imported; a proof runs on one GPU."""
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
