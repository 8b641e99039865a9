"""Which checkpoint a run goes on from: the last one that was written to its end."""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qwenvl_ft.errors import CheckpointError

STATE = "trainer_state.json"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*", "*/adapter_model.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*", "scheduler.pt")
AUTO = ("true", "auto", "last")


def step_of(folder: Path) -> int:
    """The step in ``checkpoint-STEP``; -1 for any other name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == PREFIX_CHECKPOINT_DIR and number.isdigit() else -1


def missing(folder: Path) -> str | None:
    """What keeps a checkpoint from being resumed, or None.

    Trainer writes the weights first and ``trainer_state.json`` last, so a run killed while it saved leaves a folder
    without a readable state.
    """
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no complete {STATE}: the run ended while it was saved"
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS + OPTIMIZERS[3:4]):
        return "it holds no weights"
    if not any(any(folder.glob(pattern)) for pattern in OPTIMIZERS):
        return "it was saved with training.save_only_model=true and holds no optimizer"
    return None


def last_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step in a run's folder."""
    folders = sorted((path for path in output_dir.glob("checkpoint-*") if path.is_dir()), key=step_of, reverse=True)
    return next((folder for folder in folders if step_of(folder) >= 0 and missing(folder) is None), None)


def resolve_resume(resume: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``training.resume_from_checkpoint`` means.

    Args:
        resume: None or false for a fresh start; true, ``auto`` or ``last`` for the last complete checkpoint of
            ``output_dir`` (a fresh start if there is none); else a folder.

    Raises:
        CheckpointError: the folder cannot be resumed; says why.
    """
    if resume is None or resume is False or str(resume).lower() in ("false", "none", ""):
        return None
    if resume is True or str(resume).lower() in AUTO:
        return last_checkpoint(output_dir)
    folder = Path(str(resume))
    if not folder.is_dir():
        last = last_checkpoint(output_dir)
        raise CheckpointError(
            f"training.resume_from_checkpoint={resume}: no such folder."
            + (f" The last complete checkpoint is {last}." if last else "")
        )
    reason = missing(folder)
    if reason is not None:
        last = last_checkpoint(folder.parent)
        raise CheckpointError(
            f"training.resume_from_checkpoint={resume}: {reason}."
            + (f" The last complete one is {last}." if last else "")
        )
    return folder
