"""Where in its stream did a checkpoint's run stand? Saves the beginning of the window that it trained on.

The step number says how much of that window is done; what was read before it is never read again.
"""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.data.plan.windows import Saved, WindowDataset
from qwenvl_ft.errors import CheckpointError

STREAM = "stream.json"
"""File in the checkpoint of a run with ``data.streaming``."""


def save_position(sampler: Any, folder: Path) -> None:
    """Write the position of a plan's data set into a checkpoint; nothing if it is no stream."""
    dataset = sampler.dataset
    if isinstance(dataset, WindowDataset):
        saved = dataset.saved(sampler.before(dataset.present))
        (folder / STREAM).write_text(json.dumps(saved.to_dict()) + "\n", encoding="utf-8")


def saved_position(folder: Path | None) -> Saved:
    """Return the position in a checkpoint; the beginning without a checkpoint.

    Raises:
        CheckpointError: the checkpoint is of a run without a stream.
    """
    if folder is None:
        return Saved()
    path = folder / STREAM
    if not path.is_file():
        raise CheckpointError(
            f"training.resume_from_checkpoint={folder}: there is no {STREAM}, so its run had no data.streaming. Remove "
            "the key, or start a new run in another training.output_dir."
        )
    return Saved.from_dict(json.loads(path.read_text(encoding="utf-8")))
