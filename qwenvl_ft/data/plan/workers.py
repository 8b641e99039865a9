"""What keeps a loader's workers from hanging the run that waits for them."""

import os
import tempfile

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.workers import end_with_lost_items

SOCKET_PATH = 107
"""Longest path of a socket, in bytes (unix(7))."""
SOCKET_NAME = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""What multiprocessing adds to the temporary folder."""


def require_short_tempdir() -> None:
    """Workers hand tensors over through sockets in the temporary folder, whose paths the system limits.

    Raises:
        RecipeError: the folder's path leaves no room for them.
    """
    folder = tempfile.gettempdir()
    size, limit = len(os.fsencode(folder)), SOCKET_PATH - SOCKET_NAME
    if size > limit:
        raise RecipeError(
            f"TMPDIR={folder} has {size} bytes, but loader workers need a path of at most {limit} for their sockets. "
            "Set a shorter one, e.g. TMPDIR=/tmp, or training.dataloader_num_workers=0."
        )


def fail_loudly(worker: int) -> None:
    """``worker_init_fn``: a worker that cannot hand a batch over ends, and the run with it.

    multiprocessing only prints the error (too many open files, a full /dev/shm) and goes on without the batch, for
    which the run would wait for ever.
    """
    end_with_lost_items()
