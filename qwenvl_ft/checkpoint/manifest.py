"""Which files does a save consist of? `begin` marks a folder, `seal` lists its files, and `size_fault` and
`content_fault` check them.

The manifest is written last, under another name, and then renamed. A process that is killed at any moment therefore
leaves a folder with a manifest that lists all of its files, or a folder without one:

| in the folder | what happened |
|---|---|
| ``manifest.json`` | the save was completed; the file lists every other one with its size and hash |
| ``.saving`` without ``manifest.json`` | the save or the removal of the folder was not completed |
| neither | an older release, or another tool, wrote the folder |

Several ranks share the work, and call these functions together. Machines that share no disk each have a folder of their
own: the first rank of each writes the manifest of that folder, and rank 0 writes its own last.
"""

import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

MANIFEST = "manifest.json"
SAVING = ".saving"
"""Name of an empty file in a folder while it is written or removed."""
EVERYTHING = ("**/*",)
BLOCK = 4 * 2**20
"""Number of bytes that are read at once."""
Entry = tuple[int, str]
"""Size of a file in bytes, and its hash (xxh3, 128 bits, hexadecimal)."""


def begin(folder: Path, *, empty: bool = True) -> None:
    """Mark a folder as being written; on all ranks.

    Args:
        empty: remove first what an earlier save left there, such as the files of more ranks.
    """
    gather()
    if empty and leads_machine():
        remove(folder)
    gather()
    if leads_machine():
        folder.mkdir(parents=True, exist_ok=True)
        _unseal(folder)
    gather()


def seal(folder: Path, patterns: Iterable[str] = EVERYTHING) -> bool:
    """Write the manifest when all ranks have written their files; on all ranks.

    Args:
        patterns: the files that the manifest lists.

    Returns:
        True on the one rank of each disk that wrote its manifest.
    """
    token = gather(secrets.token_hex(8))[0]
    if rank() == 0:
        (folder / SAVING).write_text(token, encoding="utf-8")
    gather()
    disk = "" if _text(folder / SAVING) == token else f"of {platform.node()}"
    found = gather((disk, _sizes(folder, patterns)))
    sizes = {name: size for other, listed in found if other == disk for name, size in listed.items()}
    members = [index for index, (other, _) in enumerate(found) if other == disk]
    own = {name: _entry(folder / name, sync=True) for name in _share(sizes, members)}
    parts = gather(own)
    files = {name: entry for index in members for name, entry in parts[index].items()}
    leads = members[0] == rank()
    for turn in (rank() > 0, rank() == 0):
        if turn and leads:
            _write(folder, {"processes": len(found), "files": dict(sorted(files.items()))})
        gather()
    return leads


def read(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest: the number of ``processes``, and ``files`` as name -> `Entry`; None without one."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content["files"] = {name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return dict(content)


def partial(folder: Path) -> bool:
    """Return True if a save to this folder, or its removal, was not completed."""
    return (folder / SAVING).exists() and not (folder / MANIFEST).exists()


def size_fault(folder: Path, files: dict[str, Entry]) -> str | None:
    """Return which file is missing or has another size than the manifest says; None if there is none."""
    for name, (size, _) in files.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    return None


def content_fault(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """Return which file does not hold the bytes that were saved; None if there is none, or no manifest.

    On all ranks, with the same answer. Each file is read once for each disk, by one of its ranks.

    Args:
        names: only these files; None reads all.
    """
    manifest = read(folder)
    files = manifest["files"] if manifest is not None else {}
    files = {name: files[name] for name in (files if names is None else names) if name in files}
    disks = gather(_identity(folder / MANIFEST))
    members = [index for index, disk in enumerate(disks) if disk == disks[rank()]]
    own = None
    for name in _share({name: size for name, (size, _) in files.items()}, members):
        try:
            same = _entry(folder / name) == files[name]
        except OSError as error:
            own = f"{name} cannot be read ({error.strerror})"
            break
        if not same:
            own = f"{name} does not hold the bytes that were saved"
            break
    return next((fault for fault in gather(own) if fault is not None), None)


def remove(folder: Path) -> None:
    """Remove a folder so that no moment leaves a part of it that looks complete; several machines may do so at once.

    The mark of an unfinished folder is removed last. It stays if something cannot be removed.
    """
    if not folder.is_dir():
        return
    with suppress(OSError):  # another machine was faster, or the disk is full
        _unseal(folder)
    for path in folder.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != SAVING:
            with suppress(OSError):
                path.unlink()
    if {path.name for path in folder.glob("*")} <= {SAVING}:
        shutil.rmtree(folder, ignore_errors=True)


def are_joined() -> bool:
    """Return True if this process is one of several ranks that can talk to each other."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number among all ranks."""
    return dist.get_rank() if are_joined() else 0


def gather(value: Any = None) -> list[Any]:
    """Return the values of all ranks in order, after all have called this."""
    if not are_joined():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leads_machine() -> bool:
    """Return True on one rank of each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _unseal(folder: Path) -> None:
    """Rename the manifest to the mark of an unfinished folder, which needs no space on the disk."""
    try:
        (folder / MANIFEST).replace(folder / SAVING)
    except OSError:
        (folder / SAVING).touch()


def _share(sizes: dict[str, int], members: list[int]) -> list[str]:
    """Return the files that this rank reads: the largest ones are dealt out first."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[members.index(rank()) :: len(members)]


def _sizes(folder: Path, patterns: Iterable[str]) -> dict[str, int]:
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {name: path.stat().st_size for name, path in names.items() if name not in (MANIFEST, SAVING)}


def _entry(path: Path, *, sync: bool = False) -> Entry:
    """Return the size and hash of a file; ``sync`` waits until its bytes have reached the disk."""
    digest, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return size, digest.hexdigest()


def _write(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest in one step and remove the mark."""
    new = folder / f"{SAVING}.{MANIFEST}"
    with new.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / MANIFEST)
    (folder / SAVING).unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # a file system that cannot sync a folder
        pass
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[Any, ...]:
    """Return what only ranks that see the same file have in common."""
    try:
        state = path.stat()
    except OSError:
        return (platform.node(),)
    return state.st_ino, state.st_mtime_ns, _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
