"""Keeps a failing dataloader worker from hanging the run that waits for it."""

import os
import tempfile

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.workers import end_with_lost_items

SOCKET_PATH = 107
"""Maximum length of a Unix socket's path, in bytes (unix(7))."""
SOCKET_NAME = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes that multiprocessing appends to the temporary folder's path."""


def require_short_tempdir() -> None:
    """Check that dataloader workers can open sockets in the temporary folder, through which they pass tensors.

    Raises:
        RecipeError: the folder's path is so long that the sockets' paths exceed the system's limit.
    """
    folder = tempfile.gettempdir()
    size, limit = len(os.fsencode(folder)), SOCKET_PATH - SOCKET_NAME
    if size > limit:
        raise RecipeError(
            f"TMPDIR={folder} has {size} bytes, but dataloader workers need a path of at most {limit} for their "
            "sockets. Set a shorter one, e.g. TMPDIR=/tmp, or training.dataloader_num_workers=0."
        )


def fail_loudly(worker: int) -> None:
    """End a worker that cannot send a batch, which ends the run; for ``worker_init_fn``.

    By default multiprocessing only prints the error (too many open files, a full /dev/shm) and drops the batch, and
    the run waits for it forever.
    """
    end_with_lost_items()
