"""The shards of a stream: lists them, and copies one at a time to a folder of this machine.

A shard is a file of records: a path, a URL or the address of an object store. http(s) goes through httpx; every other
address goes through fsspec, whose packages for stores are installed apart (``s3fs``, ``gcsfs``, ``adlfs``). Keys and
endpoints come from the environment or their own files, never from a recipe, which is saved with the model.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from filelock import FileLock

from qwenvl_ft.data.sources.registry import DATASETS, FILES, UNLISTED, find_dataset, matching_files
from qwenvl_ft.errors import DataError, one_line

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try to copy a shard."""
STALLED_SECONDS = 60.0
"""Seconds without a byte after which a copy over http(s) has failed."""
FINAL = (400, 401, 403, 404, 410)
"""Answers of a web server after which a new try is of no use."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that takes nothing more."""
READ_BYTES = 4 * 1024 * 1024
"""Bytes of a shard that are hashed at a time."""
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shard(NamedTuple):
    """One file of a stream."""

    name: str
    """Name of its data set."""
    address: str


class ShardError(DataError):
    """A shard cannot be copied."""


class GoneError(Exception):
    """A shard cannot be had, and a new try would not help."""


def list_shards(selection: str | list[str]) -> list[Shard]:
    """Return the shards of a selection: registered names, paths and addresses, in order.

    ``{000..123}`` stands for all numbers between the two, with leading zeros. ``*`` stands for what the folder or the
    store holds, sorted by name; a web server has no such list.

    Raises:
        DataError: nothing matches, a shard is not a data set file or is listed twice, or a name has a rate.
    """
    parts = selection.split(",") if isinstance(selection, str) else selection
    shards = [
        Shard(name, address)
        for name in filter(None, map(str.strip, parts))
        for address in _addresses(name, _path(name))
    ]
    if not shards:
        raise DataError("data.train names no shards. Example: data.train=s3://bucket/train-*.tar.")
    seen: set[str] = set()
    for name, address in shards:
        if not _file_name(address).endswith(FILES):
            raise DataError(f"data set {name}: {address} is no shard. It must be a file ending in {', '.join(FILES)}.")
        if address in seen:
            raise DataError(f"data set {name}: {address} is listed twice. A stream reads each shard once in a round.")
        seen.add(address)
    return shards


def is_remote(address: str) -> bool:
    return "://" in address


def folder_of(address: str, folder: Path) -> Path:
    """Return the folder that holds a shard's copy and what is made from it."""
    return folder / "shards" / hashlib.sha256(address.encode()).hexdigest()[:24]


def fetch(address: str, folder: Path) -> Path:
    """Return the path of a shard on this machine: its own, or that of a copy below ``folder``, made now if need be.

    If several processes want the same copy, one makes it while the others wait.

    Raises:
        ShardError: there is no such shard, it cannot be copied after several tries, or the disk is full.
    """
    if not is_remote(address):
        if not Path(address).is_file():
            raise ShardError(f"the shard {address} does not exist.")
        return Path(address)
    place = folder_of(address, folder)
    target = place / _file_name(address)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _copy(address, target)
    except OSError as error:
        raise ShardError(
            f"the shard {address} cannot be written to {folder}: {error.strerror or error}. Set data.stream_cache to a "
            "folder on a disk with enough space."
        ) from None
    return target


def digest_of(path: Path) -> str:
    """Return a hash of a shard's bytes, at the speed of the disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def drop(address: str, folder: Path) -> None:
    """Remove a shard's copy and what was made from it; a shard that is no copy stays."""
    shutil.rmtree(folder_of(address, folder), ignore_errors=True)


# -- listing -------------------------------------------------------------------------------------------------------


def _path(name: str) -> str:
    """Return the path or address behind a name of a selection."""
    known = name in UNLISTED | DATASETS
    if known or not (is_remote(name) or name.endswith(FILES)):
        if not known and re.search(r"[%#]\d+(\.\d+)?$", name):
            raise DataError(f"data set {name!r}: a stream is read whole, without a rate. Remove the rate.")
        return str(find_dataset(name)["annotation_path"])
    return name


def _addresses(name: str, path: str) -> list[str]:
    expanded = _numbered(path)
    return [found for entry in expanded for found in _matching(name, entry)]


def _numbered(path: str) -> list[str]:
    """Expand ``{000..123}``, several times if there are several."""
    match = NUMBERS.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"{path}: {match[0]} counts down. Write the smaller number first.")
    rest = _numbered(path[match.end() :])
    return [
        f"{path[: match.start()]}{number:0{len(first)}d}{tail}"
        for number in range(int(first), int(last) + 1)
        for tail in rest
    ]


def _matching(name: str, path: str) -> list[str]:
    if not is_remote(path):
        return [os.path.abspath(found) for found in matching_files(str(Path(path).expanduser()))]  # noqa: PTH100
    if path.startswith(("http://", "https://")):
        if "*" in path:
            raise DataError(f"data set {name}: {path}: a web server has no list of its files. Write {{000..123}}.")
        return [path]
    if not has_magic(path):
        return [path]
    try:
        store, pattern = _store(path)
        found = sorted(store.unstrip_protocol(entry) for entry in store.glob(pattern))
    except DataError:
        raise
    except Exception as error:  # of any type: each store has its own
        raise DataError(f"data set {name}: {path} cannot be listed: {one_line(error)}.") from None
    if not found:
        raise DataError(f"data set {name}: no file matches {path}.")
    return found


def _file_name(address: str) -> str:
    """Return the last part of a path or address, without the query of a URL."""
    return address.partition("?")[0].rpartition("/")[2] if is_remote(address) else Path(address).name


# -- copying -------------------------------------------------------------------------------------------------------


def _copy(address: str, target: Path) -> None:
    """Copy a shard, with new tries; the file is there under its name only if it is whole."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    copy: Callable[[str, Path], None] = _over_http if address.startswith(("http://", "https://")) else _from_store
    try:
        for wait in (*WAITS, None):
            try:
                copy(address, partial)
                partial.replace(target)
                return
            except (GoneError, FileNotFoundError, PermissionError) as error:
                raise ShardError(f"the shard {address} cannot be read: {one_line(error)}.") from None
            except (DataError, MemoryError):
                raise
            except Exception as error:  # of any type: each store has its own
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                if wait is None:
                    tries = f"after {len(WAITS) + 1} tries"
                    raise ShardError(f"the shard {address} cannot be read {tries}: {one_line(error)}.") from None
                time.sleep(wait)
    finally:
        partial.unlink(missing_ok=True)


def _over_http(address: str, partial: Path) -> None:
    import httpx

    as_it_is = {"Accept-Encoding": "identity"}
    with httpx.stream("GET", address, headers=as_it_is, timeout=STALLED_SECONDS, follow_redirects=True) as answer:
        if answer.status_code in FINAL:
            raise GoneError(f"the server answers {answer.status_code} {answer.reason_phrase}")
        answer.raise_for_status()
        with partial.open("wb") as file:
            for chunk in answer.iter_raw():
                file.write(chunk)
        _require_whole(partial, answer.headers)


def _require_whole(partial: Path, headers: Mapping[str, str]) -> None:
    expected = headers.get("content-length")
    if expected is not None and partial.stat().st_size != int(expected):
        raise ConnectionError(f"{partial.stat().st_size} of {expected} bytes came")


def _from_store(address: str, partial: Path) -> None:
    store, path = _store(address)
    size = store.info(path).get("size")
    store.get_file(path, str(partial))
    if size is not None and partial.stat().st_size != size:
        raise ConnectionError(f"{partial.stat().st_size} of {size} bytes came")


def _store(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    Raises:
        DataError: no package knows such addresses, or it is not installed.
    """
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise DataError(f"{address} cannot be opened: {one_line(error).rstrip('.')}. Install its package.") from None
    return store, path
