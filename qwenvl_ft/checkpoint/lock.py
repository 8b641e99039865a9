"""Is a folder written by one run only? A lock file names the process that writes it, and every other run is refused.

A lock whose process has ended is taken over: at once if it ran on this machine, where a process is known by its number
and start time. Processes of other machines (a job that was restarted on another node) cannot be seen from here, so the
owner renews the file every `RENEWED` seconds, and a lock that was not renewed for `EXPIRES` seconds is taken over too.
Both times are those of the file system, so the clocks of the machines do not matter.
"""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from qwenvl_ft.errors import CheckpointError

LOCK = "run.lock"
"""File in the output directory of a run, from its start to its end."""
RENEWED = 10.0
"""Seconds between two renewals of a lock."""
EXPIRES = 60.0
"""Seconds without a renewal after which the owner of a lock on another machine counts as dead."""
SETTLES = 0.3
"""Seconds after which a process that took a lock over looks if another one did so at the same moment."""

_held: dict[Path, "_Lock"] = {}
"""Folder -> the lock on it of this process."""


@dataclass(frozen=True)
class Owner:
    """The process that a lock names."""

    host: str
    pid: int
    since: str
    """Local time at which the lock was taken, as ``2026-01-31 12:00:00``."""
    machine: str
    """Identifies the machine since it was booted, and the container: processes of others cannot be seen."""
    started: str
    """Start time of the process; another process with the same number has another one."""
    token: str
    """Differs between any two locks."""

    @classmethod
    def this(cls) -> "Owner":
        """Return this process."""
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        started = _started(os.getpid()) or ""
        return cls(socket.gethostname(), os.getpid(), since, _machine(), started, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def only_run_in(folder: Path, report: Callable[[str], None] = print) -> Iterator[None]:
    """Lock a folder inside the context; for rank 0. A folder within one that this process has locked needs no lock.

    Folders that had to be made for the lock are removed at the end if they are empty.

    Args:
        report: takes a line if the lock of a dead process is taken over.

    Raises:
        CheckpointError: another process that is alive has locked the folder, or the lock cannot be written.
    """
    folder = folder.absolute()
    if any(place in _held for place in (folder, *folder.parents)):
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _Lock(folder, report)
    except OSError as error:
        raise CheckpointError(f"training.output_dir={folder}: {LOCK} cannot be written: {error.strerror}.") from error
    _held[folder] = lock
    try:
        yield
    finally:
        del _held[folder]
        lock.release()
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def require_own(folder: Path) -> None:
    """Raise if another run has taken over the lock of this process, which must have been stopped for a while.

    Raises:
        CheckpointError: names the new owner.
    """
    folder = folder.absolute()
    lock = next((_held[place] for place in (folder, *folder.parents) if place in _held), None)
    if lock is None or lock.is_own():
        return
    raise CheckpointError(
        f"training.output_dir={lock.path.parent} was taken over by {_read(lock.path) or 'another run'} while this "
        f"process was stopped for more than {EXPIRES:.0f} s. This run writes no more there."
    )


class _Lock:
    """A lock that this process holds, and the thread that renews it."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.path = folder / LOCK
        self.owner = Owner.this()
        self._ended = threading.Event()
        while not self._create():
            self._take_over(report)
        threading.Thread(target=self._renew, name=LOCK, daemon=True).start()

    def is_own(self) -> bool:
        """Return True unless the file names another owner; a file that was removed is made again."""
        found = _read(self.path)
        if found is None and not self.path.exists():
            return self._create()
        return found is None or found.token == self.owner.token

    def release(self) -> None:
        """Stop renewing and remove the file if it is still this process's."""
        self._ended.set()
        found = _read(self.path)
        if found is not None and found.token == self.owner.token:
            with suppress(OSError):
                self.path.unlink()

    def _create(self) -> bool:
        """Write the file; return False if there is one."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            found = _read(self.path)
            return found is not None and found.token == self.owner.token  # as after `_take_over`
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._text())
        return True

    def _take_over(self, report: Callable[[str], None]) -> None:
        """Replace the file of a dead owner.

        Raises:
            CheckpointError: the owner is alive.
        """
        found = _read(self.path)
        if found is not None and _is_visible(found):
            dead = _started(found.pid) != found.started
        else:
            dead = _expires(self.path, lambda: report(f"{self.path} of {found or 'a run'}: waiting for a sign of life"))
        if not dead:
            raise CheckpointError(
                f"training.output_dir={self.path.parent} is being written by {_read(self.path) or 'another run'}. Wait "
                f"until it ends, stop it, or choose another folder. If it is surely dead, remove {self.path}."
            )
        now = _read(self.path)
        if now is not None and (found is None or now.token != found.token):
            return  # another process took it over meanwhile
        if not self.path.exists():
            return
        mine = self.path.with_name(f"{LOCK}.{self.owner.token}")
        mine.write_text(self._text(), encoding="utf-8")
        mine.replace(self.path)
        time.sleep(SETTLES)  # of several processes the last one stays
        settled = _read(self.path)
        if settled is not None and settled.token == self.owner.token:
            report(f"took over {self.path} of {found or 'a run'}, which has ended")

    def _text(self) -> str:
        return json.dumps(asdict(self.owner)) + "\n"

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with suppress(OSError):
                if (found := _read(self.path)) is not None and found.token == self.owner.token:
                    os.utime(self.path)


def _read(path: Path) -> Owner | None:
    """Return the owner that a lock names; None if it cannot be read, as while it is written."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _expires(path: Path, waiting: Callable[[], None]) -> bool:
    """Wait until a lock is renewed, removed or expired; return True if it was not renewed.

    Args:
        waiting: called if the answer takes time.
    """
    try:
        with path.open("rb") as file:
            renewed = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return True
    if _now(path.parent) - renewed < EXPIRES * 1e9:
        waiting()
    while _now(path.parent) - renewed < EXPIRES * 1e9:
        time.sleep(min(1.0, EXPIRES / 10))
        try:
            with path.open("rb") as file:  # opening a file makes a network file system look at the server's times
                if os.fstat(file.fileno()).st_mtime_ns != renewed:
                    return False
        except FileNotFoundError:
            return True
    return True


def _now(folder: Path) -> int:
    """Return the time of a folder's file system, in nanoseconds."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_mtime_ns


def _is_visible(owner: Owner) -> bool:
    """Return True if this process would see the owner if it were alive."""
    return bool(owner.started) and owner.machine == _machine()


def _machine() -> str:
    """Return an identity of this machine since its boot and of this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _started(pid: int) -> str | None:
    """Return the start time of a process; None if there is none, or if it has ended and nobody has asked how."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc(5)
