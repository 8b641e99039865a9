"""``qwenvl-ft inspect``: prints the contents of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint, an adapter or a model.")],
    keys: Annotated[
        str | None, typer.Option(help="List the weights whose names contain this text, for example merger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print method, weights by part, ranks and sizes of a checkpoint, and what can load it."""
    import json
    from dataclasses import asdict

    from qwenvl_ft.export.contents import as_text, read_contents

    contents = read_contents(checkpoint, keys=keys)
    typer.echo(json.dumps(asdict(contents)) if as_json else as_text(contents))
