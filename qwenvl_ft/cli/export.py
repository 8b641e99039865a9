"""``qwenvl-ft export``: writes what a serving engine takes, and prints the command that starts it."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an adapter, a checkpoint or a merged model.")],
    out: Annotated[Path, typer.Argument(help="New folder for what is served.")],
    engine: Annotated[str, typer.Option("--for", help="vllm, sglang, peft or transformers.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base model.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model, if it is no longer where the adapter says.")] = None,
    torch_dtype: Annotated[str, typer.Option(help="Precision of a merged model; auto is the base model's.")] = "auto",
    images_per_prompt: Annotated[int | None, typer.Option(help="Most images in a prompt, for vLLM's command.")] = None,
    videos_per_prompt: Annotated[int | None, typer.Option(help="Most videos in a prompt, for vLLM's command.")] = None,
) -> None:
    """Write what an engine takes, and say what it does not take; nothing is written that it would leave out."""
    from transformers.utils import logging

    from qwenvl_ft.export.serving import export as write

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    media = {"image": images_per_prompt, "video": videos_per_prompt}
    done = write(
        checkpoint,
        out,
        engine,
        merged=merge,
        base=base,
        torch_dtype=torch_dtype,
        media_per_prompt={name: count for name, count in media.items() if count is not None},
    )
    what = f"adapter of rank {done.rank} for {done.base}" if done.rank else done.kind
    typer.echo(f"{done.folder}: {what}, for {engine}")
    for line in (*done.notes, *([f"Start it with:\n{done.command}"] if done.command else [])):
        typer.echo(line)
