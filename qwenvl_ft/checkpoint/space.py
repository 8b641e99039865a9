"""Does a checkpoint fit on the disk, and what if writing it fails? One line that names the folder and the bytes."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenvl_ft.checkpoint.complete import WEIGHTS, finished, step_of
from qwenvl_ft.checkpoint.manifest import remove
from qwenvl_ft.errors import CheckpointError, one_line

CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an error",
    errno.ESTALE: "the network file system has lost the folder",
    errno.EACCES: "access is denied",
    errno.EPERM: "access is denied",
}
"""Code of a failed write -> what it means."""
HIDDEN = re.compile(r"PytorchStreamWriter|inline_container|iostream|file write failed|unexpected pos")
"""Parts of torch's messages about failed writes, which have no code."""
RUST = re.compile(r"\(os error (\d+)\)")
"""The code in a message of safetensors and tokenizers, whose errors have no ``errno``."""


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write to the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shown_bytes(count: int) -> str:
    """Return a number of bytes for people, as ``1.5 GiB``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def require_space(folder: Path, needed: int, what: str, advice: str) -> None:
    """Raise if a folder's disk has less than ``needed`` bytes left.

    Args:
        what: what is to be written there, for the message.
        advice: what else can be done, for the message.

    Raises:
        CheckpointError: names the folder and both numbers of bytes.
    """
    free = free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"training.output_dir={folder}: {shown_bytes(free)} are free, but {what} needs {shown_bytes(needed)}. "
            f"Free some space, or {advice}."
        )


def failed_write(error: BaseException) -> str:
    """Return why a write failed if that is what an error, or one of its causes, reports; else an empty string."""
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        if code is None and (match := RUST.search(str(seen))):
            code = int(match[1])
        if code in CAUSES:
            return CAUSES[code]
        named = next((cause for code, cause in CAUSES.items() if os.strerror(code) in str(seen)), "")
        if named or HIDDEN.search(str(seen)):
            return named or f"writing failed ({one_line(str(seen), 80)})"
        seen = seen.__cause__ or seen.__context__
    return ""


@contextmanager
def written_whole(folder: Path, needed: Callable[[], int], *, removes: bool) -> Iterator[None]:
    """Leave no part of a model or checkpoint in a folder if writing it inside the context fails.

    Args:
        needed: returns the bytes that are to be written.
        removes: remove what was written: a checkpoint that is not complete, or the weights of a model. True on one
            rank only.

    Raises:
        CheckpointError: a write failed; names the folder, the cause, the bytes free then, and the bytes needed.
    """
    before = _written(folder)
    try:
        yield
    except Exception as error:
        cause, free = failed_write(error), free_bytes(folder)
        if removes:
            _remove_new(folder, before)
        if not cause:
            raise
        raise CheckpointError(
            f"{folder} could not be written: {cause}; {shown_bytes(free)} were free, and it needs "
            f"{shown_bytes(needed())}. What was written of it is removed{'' if removes else ' at the next start'}. "
            "Free some space, then go on from the last checkpoint with training.resume_from_checkpoint=true."
        ) from error


def _written(folder: Path) -> dict[Path, int]:
    """Return the weights in a folder: path -> time of its last change, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for pattern in WEIGHTS for path in folder.glob(pattern)}


def _remove_new(folder: Path, before: dict[Path, int]) -> None:
    """Remove a checkpoint, or the weights in the folder of a run that are not those of ``before``."""
    if step_of(folder) >= 0:
        if not finished(folder):
            remove(folder)
        return
    for path, changed in _written(folder).items():
        if before.get(path) != changed:
            path.unlink(missing_ok=True)
