"""A loader whose workers cannot send their batches ends with an error instead of waiting forever."""

import subprocess
import sys
import tempfile

import pytest

from qwenvl_ft.data.plan.workers import require_short_tempdir
from qwenvl_ft.errors import RecipeError

LOADER = """
import sys
from torch.utils.data import DataLoader
from qwenvl_ft.data.plan.workers import fail_loudly

def unpicklable(samples):
    return lambda: samples

def start(worker):
    if "guarded" in sys.argv:
        fail_loudly(worker)
    if "closed" in sys.argv:
        sys.stderr = None

next(iter(DataLoader([1, 2], num_workers=1, collate_fn=unpicklable, timeout=8, worker_init_fn=start)))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "timed out after 8"),
        (["guarded"], "exited unexpectedly"),
        (["guarded", "closed"], "exited unexpectedly"),
    ],
    ids=["plain", "guarded", "without sys.stderr"],
)
def test_a_batch_that_cannot_be_sent_ends_the_loader(arguments, message):
    """Without the guard the loader waits until its timeout; a training run sets none."""
    ended = subprocess.run([sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True, timeout=300)
    assert message in ended.stderr.splitlines()[-1]
    assert "local object" in ended.stderr, "the cause is printed in each case"


def test_a_temporary_folder_with_too_long_a_path_is_an_error(monkeypatch, tmp_path):
    require_short_tempdir()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 74)
    require_short_tempdir()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 75)
    with pytest.raises(RecipeError, match=r"TMPDIR=/t+ has 76 bytes.*at most 75.*TMPDIR=/tmp"):
        require_short_tempdir()
