"""Completes what a run saves: the manifest is written last, and only then are older checkpoints removed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from qwenvl_ft.checkpoint.complete import PREFIX, RESULT, rotate
from qwenvl_ft.checkpoint.manifest import begin, seal


@contextmanager
def sealed_checkpoint(args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """Return a context in which all ranks write the checkpoint of the current step."""
    output_dir = Path(str(args.output_dir))
    folder = output_dir / f"{PREFIX}-{state.global_step}"
    begin(folder)
    yield
    best = state.best_model_checkpoint
    if seal(folder):
        rotate(output_dir, args.save_total_limit, keep=[Path(best)] if best else [])


@contextmanager
def sealed_result(folder: Path) -> Iterator[None]:
    """Return a context in which all ranks write the result of a run into its folder."""
    begin(folder, empty=False)
    yield
    seal(folder, RESULT)
