"""Which checkpoint does a run resume from? The newest complete one; what is newer and damaged is named."""

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwenvl_ft.checkpoint.manifest import (
    MANIFEST,
    content_fault,
    gather,
    leads_machine,
    partial,
    read,
    remove,
    size_fault,
)
from qwenvl_ft.errors import CheckpointError

PREFIX = "checkpoint"
"""Prefix of a checkpoint's folder; transformers' Trainer names it ``checkpoint-STEP``."""
STATE = "trainer_state.json"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*", "*/adapter_model.safetensors")
SHARDS = "global_step*"
"""Folder of DeepSpeed's weights and optimizer state."""
OPTIMIZER = "an optimizer"
REQUIRED = {
    f"a {STATE}": (STATE,),
    "weights": (*WEIGHTS, SHARDS),
    OPTIMIZER: ("optimizer.pt", "optimizer.bin", "optimizer_0", SHARDS),
    "a schedule (scheduler.pt)": ("scheduler.pt",),
    "random states (rng_state*.pth)": ("rng_state*.pth",),
    "a plan of its rows (plan.json)": ("plan.json",),
}
"""What a checkpoint must hold to be resumed -> patterns, one of which must match."""
RESULT = (*WEIGHTS[:3], "*.safetensors.index.json", STATE)
"""The files of a finished run's output that its manifest lists; the others may be edited."""
AUTO = ("true", "auto", "last")
"""Values of ``training.resume_from_checkpoint`` that mean the last complete checkpoint."""
FRESH = ("false", "none", "")
NO_OPTIMIZER = "it holds no optimizer: it is the end of a run, or was saved with training.save_only_model=true"
NO_FOLDER = "no such folder"
NOT_COMPLETED = "the run ended while it was saved"
WEIGHTS_ONLY = "To start a new run from the weights alone, set training.resume_weights_only=true"


@dataclass(frozen=True)
class Resume:
    """Where a run begins."""

    folder: Path | None
    """The checkpoint that it resumes; None for a fresh start."""
    passed: tuple[str, ...] = ()
    """One line for each newer checkpoint that is not complete, with the reason."""

    def lines(self) -> list[str]:
        """Return what a run says about its beginning."""
        if self.folder is None:
            return [*self.passed, "no checkpoint is complete: starting from the beginning"] if self.passed else []
        unsealed = (
            f"{self.folder} has no {MANIFEST}, as those of older releases: only the form of its files was checked"
        )
        return [*self.passed, *([unsealed] if read(self.folder) is None else []), f"resuming from {self.folder}"]


def step_of(folder: Path) -> int:
    """Return the step in ``checkpoint-STEP``; -1 for any other name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == PREFIX and number.isdigit() else -1


def checkpoints(output_dir: Path) -> list[Path]:
    """Return all checkpoints in a run's folder, complete or not, the highest step first."""
    folders = [path for path in output_dir.glob(f"{PREFIX}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of, reverse=True)


def missing(folder: Path) -> str | None:
    """Return the reason why a checkpoint cannot be resumed, or None if it can; file contents are not compared.

    A checkpoint without a manifest, of an older release or another tool, is complete if it holds all of `REQUIRED` and
    none of its files is cut off.
    """
    fault = incomplete(folder)
    if fault is not None:
        return fault
    for what, patterns in REQUIRED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return NO_OPTIMIZER if what == OPTIMIZER else f"it holds no {what.removeprefix('a ').removeprefix('an ')}"
    return None


def incomplete(folder: Path) -> str | None:
    """Return which file of a save is missing or cut off, or None; a save may hold no optimizer."""
    if partial(folder):
        return NOT_COMPLETED
    manifest = read(folder)
    if manifest is not None:
        return size_fault(folder, manifest["files"])
    if (folder / MANIFEST).exists():
        return f"{MANIFEST} cannot be read"
    if not (folder / STATE).is_file():
        return f"it has no {STATE}: {NOT_COMPLETED}"
    cut = next((path for path in sorted(folder.rglob("*")) if path.is_file() and not _whole(path)), None)
    return None if cut is None else f"{cut.relative_to(folder)} is cut off ({cut.stat().st_size:,} bytes)"


def finished(folder: Path) -> bool:
    """Return True if the output of a run is complete: the state and weights that it wrote at its end."""
    if partial(folder):
        return False
    manifest = read(folder)
    if manifest is not None:
        return size_fault(folder, manifest["files"]) is None
    return (folder / STATE).is_file() and _whole(folder / STATE)


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint with the highest step that can be resumed, by names and sizes of its files, or None."""
    return next((folder for folder in checkpoints(output_dir) if missing(folder) is None), None)


def is_fresh(resume: str | bool | None) -> bool:
    """Return True if ``training.resume_from_checkpoint`` asks for a fresh start."""
    return resume is None or str(resume).lower() in FRESH


def resolve_resume(resume: str | bool | None, output_dir: Path) -> Resume:
    """Return the checkpoint that ``training.resume_from_checkpoint`` asks for; on all ranks, with the same answer.

    Args:
        resume: None or false for a fresh start; true, ``auto`` or ``last`` for the last complete checkpoint of
            ``output_dir`` (a fresh start if it has none); else a folder.

    Raises:
        CheckpointError: the folder cannot be resumed, or a fresh start would write into the folder of an earlier run,
            whose checkpoints or weights would be taken for its own.
    """
    if is_fresh(resume):
        last = last_checkpoint(output_dir)
        if last is not None:
            raise CheckpointError(
                f"training.output_dir={output_dir} holds {last.name} of an earlier run. Resume it with "
                "training.resume_from_checkpoint=true, or choose another folder."
            )
        _require_no_model(output_dir)
        return Resume(None)
    if str(resume).lower() in AUTO:
        found = _newest(output_dir)
        if found.folder is None:
            _require_restartable(f"training.resume_from_checkpoint={resume}", output_dir)
        return found
    folder = Path(str(resume))
    fault = _fault(folder)
    if fault is not None:
        last = _newest(output_dir if fault == NO_FOLDER else folder.parent).folder
        raise CheckpointError(
            f"training.resume_from_checkpoint={resume}: {fault}. "
            + (
                f"The last complete checkpoint is {last}."
                if last
                else f"There is no complete checkpoint. {WEIGHTS_ONLY}."
            )
        )
    return Resume(folder)


def remove_partial(output_dir: Path) -> list[Path]:
    """Remove the checkpoints whose save or removal was not completed; one rank of each machine does it.

    Returns:
        The folders that this rank removed.
    """
    found = [folder for folder in checkpoints(output_dir) if partial(folder)] if leads_machine() else []
    for folder in found:
        remove(folder)
    return found


def rotate(output_dir: Path, limit: int | None, *, keep: Iterable[Path] = ()) -> None:
    """Remove the oldest complete checkpoints until ``limit`` are left; incomplete ones do not count and stay.

    Args:
        limit: ``training.save_total_limit``; None or 0 keeps all.
        keep: checkpoints that stay, such as the best one. The newest one, and the newest that can be resumed, stay too.
    """
    if not limit or limit < 0:
        return
    complete = sorted((path for path in checkpoints(output_dir) if incomplete(path) is None), key=_saved_at)
    resumable = [path for path in complete if missing(path) is None]
    kept = {path.resolve() for path in (*complete[-1:], *resumable[-1:], *keep)}
    removable = [path for path in complete if path.resolve() not in kept]
    for path in removable[: max(0, len(complete) - max(limit, len(kept)))]:
        remove(path)


def _require_restartable(setting: str, output_dir: Path) -> None:
    """Raise CheckpointError if a run without a complete checkpoint cannot begin again in its folder."""
    bare = next((folder for folder in checkpoints(output_dir) if missing(folder) == NO_OPTIMIZER), None)
    if bare is not None:
        raise CheckpointError(
            f"{setting}: {bare}: {NO_OPTIMIZER}. To start from its weights, set training.resume_from_checkpoint={bare} "
            "and training.resume_weights_only=true, with another training.output_dir."
        )
    _require_no_model(output_dir)


def _require_no_model(output_dir: Path) -> None:
    """Raise CheckpointError if a model or adapter is there already: it would be loaded in place of the new one.

    One that was not saved completely is no such model; the run replaces it.
    """
    files = (file for pattern in WEIGHTS for file in sorted(output_dir.glob(pattern)))
    found = next((file for file in files if step_of(file.parent) < 0), None)
    if found is not None and not partial(output_dir):
        raise CheckpointError(
            f"training.output_dir={output_dir} holds {found.relative_to(output_dir)} already. Choose another folder "
            "or remove this file."
        )


def _saved_at(folder: Path) -> tuple[float, int]:
    """Return the time at which a checkpoint was completed, and its step."""
    sealed = folder / MANIFEST
    return (sealed if sealed.exists() else folder).stat().st_mtime, step_of(folder)


def _newest(output_dir: Path) -> Resume:
    """Return the complete checkpoint with the highest step, and what was passed over; on all ranks.

    Raises:
        CheckpointError: none is complete for all ranks, but one is for some.
    """
    names = {folder.name for listed in gather(checkpoints(output_dir)) for folder in listed}
    passed: list[str] = []
    elsewhere = ""
    for folder in sorted((output_dir / name for name in names), key=step_of, reverse=True):
        faults = gather(_own_fault(folder))
        fault = _first(faults) or content_fault(folder)
        if fault is None:
            return Resume(folder, tuple(passed))
        passed.append(f"passed over {folder}: {fault}")
        own = _first(faults)
        if not elsewhere and own is not None and None in faults:
            there, other = faults.index(None), faults.index(own)
            elsewhere = f"{folder.name} is complete for rank {there}, but for rank {other}: {own}"
    if elsewhere:
        raise CheckpointError(
            f"training.output_dir={output_dir}: {elsewhere}. Put output_dir on a disk that all nodes share, or copy "
            "the checkpoint to each node."
        )
    return Resume(None, tuple(passed))


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint on any rank, contents included; on all ranks."""
    return _first(gather(_own_fault(folder))) or content_fault(folder)


def _first(faults: list[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _own_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint on this rank, contents not compared."""
    return missing(folder) if folder.is_dir() else NO_FOLDER


def _whole(path: Path) -> bool:
    """Return False if a file is empty or its end is missing, as far as its format tells."""
    try:
        size = path.stat().st_size
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < size else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return length < size and size == 8 + length + max(ends, default=0)
        elif path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return size > 0 or path.suffix not in (".yaml", ".distcp")
