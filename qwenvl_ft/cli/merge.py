"""``qwenvl-ft merge``: an adapter and its base model as one model that plain transformers loads."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an adapter: a checkpoint, or a run's output.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model.")],
    base: Annotated[str | None, typer.Option(help="Base model, if it moved from where the adapter says.")] = None,
    torch_dtype: Annotated[str, typer.Option(help="Of the result; auto is the base model's.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> None:
    """Write a model whose weights have the adapter's update in them, with processor and generation config."""
    from transformers.utils import logging

    from qwenvl_ft.export.merge import merge as merge_adapter

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    done = merge_adapter(checkpoint, out, base=base, torch_dtype=torch_dtype, max_shard_size=max_shard_size)
    typer.echo(
        f"{done.folder}: {done.method} merged into {done.layers} layers, modules trained in full: {done.copies}; "
        f"{done.dtype}, {done.mebibytes:,.1f} MiB"
        + ("; the language head has a weight of its own now" if done.untied else "")
    )
