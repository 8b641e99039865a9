"""Where is a medium that is not where its record's relative path says? The error for it names the setting to type."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.reading import ReadAs

MEDIA_ROOT = "data.media_root"


class MediaRoot(str):
    """The folder that the relative media paths of a data file start at."""

    __slots__ = ("beside", "key")

    beside: str
    """Folder of the data file."""
    key: str
    """Recipe key that sets this folder."""

    def __new__(cls, root: str, beside: str = "", key: str = MEDIA_ROOT) -> "MediaRoot":
        made = super().__new__(cls, root)
        made.beside, made.key = beside, key
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return MediaRoot, (str(self), self.beside, self.key)


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
