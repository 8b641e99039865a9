"""Finds the checkpoint that a run resumes from: the last one that is complete."""

import json
from pathlib import Path

from qwenvl_ft.errors import CheckpointError

PREFIX = "checkpoint"
"""Prefix of a checkpoint's folder; transformers' Trainer names it ``checkpoint-STEP``."""
STATE = "trainer_state.json"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*", "*/adapter_model.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*", "scheduler.pt")
AUTO = ("true", "auto", "last")
"""Values of ``training.resume_from_checkpoint`` that mean the last complete checkpoint."""
NO_OPTIMIZER = "it holds no optimizer: it is the end of a run, or was saved with training.save_only_model=true"


def step_of(folder: Path) -> int:
    """Return the step in ``checkpoint-STEP``; -1 for any other name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == PREFIX and number.isdigit() else -1


def missing(folder: Path) -> str | None:
    """Return the reason why a checkpoint cannot be resumed, or None if it can.

    Trainer writes the weights first and ``trainer_state.json`` last, so a run killed while it saved leaves a folder
    without a readable state.
    """
    if not finished(folder):
        return f"it has no complete {STATE}: the run ended while it was saved"
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS + OPTIMIZERS[3:4]):
        return "it holds no weights"
    if not any(any(folder.glob(pattern)) for pattern in OPTIMIZERS):
        return NO_OPTIMIZER
    return None


def finished(folder: Path) -> bool:
    """Return True if a checkpoint, or the output of a run, is complete: its trainer state is written last."""
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in a run's folder, or None."""
    return next((folder for folder in _checkpoints(output_dir) if missing(folder) is None), None)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return all checkpoints in a run's folder, complete or not, the highest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of, reverse=True)


def resolve_resume(resume: str | bool | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that ``training.resume_from_checkpoint`` asks for; None for a fresh start.

    Args:
        resume: None or false for a fresh start; true, ``auto`` or ``last`` for the last complete checkpoint of
            ``output_dir`` (a fresh start if it has no checkpoint); else a folder.

    Raises:
        CheckpointError: the folder cannot be resumed, or a fresh start would write into the folder of an earlier run,
            whose checkpoints or weights would be taken for its own.
    """
    last = last_checkpoint(output_dir)
    if resume is None or resume is False or str(resume).lower() in ("false", "none", ""):
        if last is not None:
            raise CheckpointError(
                f"training.output_dir={output_dir} holds {last.name} of an earlier run. Resume it with "
                "training.resume_from_checkpoint=true, or choose another folder."
            )
        _require_no_model(output_dir)
        return None
    if resume is True or str(resume).lower() in AUTO:
        broken = [(folder, missing(folder)) for folder in _checkpoints(output_dir)]
        if last is None and any(reason == NO_OPTIMIZER for _, reason in broken):
            raise CheckpointError(
                f"training.resume_from_checkpoint={resume}: {broken[0][0]}: {broken[0][1]}. Start from its weights "
                f"instead: model.model={broken[0][0]}, with another training.output_dir."
            )
        if last is None:
            _require_no_model(output_dir)
        return last
    folder = Path(str(resume))
    if not folder.is_dir():
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


def _require_no_model(output_dir: Path) -> None:
    """Raise CheckpointError if a model or adapter is there already: it would be loaded in place of the new one."""
    found = next((file for pattern in WEIGHTS for file in sorted(output_dir.glob(pattern))), None)
    if found is not None:
        raise CheckpointError(
            f"training.output_dir={output_dir} holds {found.relative_to(output_dir)} already. Choose another folder "
            "or remove this file."
        )
