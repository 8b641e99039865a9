"""Where is a medium that is not where its record's relative path says, and may a record's path lead there at all?

The errors name the setting to type.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.reading import ReadAs
from qwenvl_ft.errors import DataError

MEDIA_ROOT = "data.media_root"


class OutsideRootError(DataError):
    """A record's path leads to a file outside the folder that its media may be in."""


class MediaRoot(str):
    """The folder that the relative media paths of a data file start at."""

    __slots__ = ("beside", "key", "strict", "within")

    beside: str
    """Folder of the data file."""
    key: str
    """Recipe key that sets this folder."""
    within: str
    """Folder that no relative path may leave by ``..``; empty for no limit."""
    strict: bool
    """Nothing may lead out of ``within``: no absolute path, and no symbolic link."""

    def __new__(
        cls, root: str, beside: str = "", key: str = MEDIA_ROOT, within: str = "", strict: bool = False
    ) -> "MediaRoot":
        made = super().__new__(cls, root)
        made.beside, made.key, made.within, made.strict = beside, key, within, strict
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return MediaRoot, (str(self), self.beside, self.key, self.within, self.strict)


def require_inside(path: str, written: str, root: Any) -> None:
    """Raise OutsideRootError if a record's path leads out of the folder that its media may be in.

    Args:
        path: the path that would be opened.
        written: the path as the record writes it.
        root: the media root of the record; only a `MediaRoot` has a limit.
    """
    if not isinstance(root, MediaRoot) or not root.within:
        return
    if root.strict:
        inside = _is_below(os.path.realpath(path), _real(root.within))
    else:
        inside = os.path.isabs(written) or ".." not in path or _is_below(os.path.normpath(path), root.within)  # noqa: PTH117
    if not inside:
        place = os.path.realpath(path) if root.strict else os.path.normpath(path)
        raise OutsideRootError(
            f"the path {written!r:.200} leads to {place:.200}, outside {root.within}. If the records may read "
            "files there, set data.media_outside_root=allow."
        )


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


class MediaPath(str):
    """A resolved path that remembers how the record writes it."""

    __slots__ = ("root", "written")

    written: str
    root: str

    def __new__(cls, path: str, written: str = "", root: str = "") -> "MediaPath":
        made = super().__new__(cls, path)
        made.written, made.root = written, root
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return MediaPath, (str(self), self.written, self.root)


def absent(kind: str, value: Any) -> str:
    """Return the error text for a file that does not exist.

    If the path that the record writes exists below the working directory, the data file's folder or a folder above
    that, the text names the file and the setting.

    Args:
        kind: image or video.
        value: the path, a `MediaPath` if it was relative.
    """
    value = value.value if isinstance(value, ReadAs) else value
    text = f"{kind} {value!s:.200} does not exist."
    if not isinstance(value, MediaPath):
        return f"{text} Relative paths start at {MEDIA_ROOT}."
    key = value.root.key if isinstance(value.root, MediaRoot) else MEDIA_ROOT
    for folder in _folders(value.root):
        path = folder / value.written
        if path.is_file():
            return f"{text} It is at {_shown(path)}; {key}={_shown(folder)} finds it."
    return f"{text} Relative paths start at {key}."


def _folders(root: str) -> Iterator[Path]:
    yield Path.cwd()
    if isinstance(root, MediaRoot) and root.beside:
        beside = Path(root.beside).absolute()
        yield from (beside, *beside.parents)


def _shown(path: Path) -> str:
    """Return a path as one types it: relative to the working directory if it is below that."""
    here = Path.cwd()
    if not path.is_relative_to(here):
        return str(path)
    below = path.relative_to(here)
    return "." if below == Path() else os.path.join(".", below)  # noqa: PTH118 - Path drops the ./
