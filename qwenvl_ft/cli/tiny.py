"""``qwenvl-ft tiny``: writes a small random checkpoint that every other command accepts as a model."""

from pathlib import Path
from typing import Annotated

import typer


def tiny(
    directory: Annotated[Path, typer.Argument(help="Output directory; created if it does not exist.")],
    moe: Annotated[
        bool, typer.Option("--moe", help="Mixture of experts, like 30B-A3B, instead of a dense model.")
    ] = False,
    family: Annotated[str, typer.Option(help="Model family: qwen3_vl, qwen3_5, qwen2_5_vl or qwen2_vl.")] = "qwen3_vl",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a tiny random checkpoint, complete with tokenizer and processor, for tests and trials."""
    from qwenvl_ft.model.tiny import make_tiny
    from qwenvl_ft.upstream.quiet import quiet

    with quiet():
        made = make_tiny(directory, moe=moe, family=family, seed=seed)
    typer.echo(made)
