"""A loader whose workers cannot send their batches ends with an error instead of waiting forever."""

import tempfile

import pytest
from torch.utils.data import DataLoader

from qwenvl_ft.data.plan.workers import fail_loudly, require_short_tempdir
from qwenvl_ft.errors import RecipeError


def unpicklable(samples):
    return lambda: samples


@pytest.mark.parametrize(("guarded", "message"), [(True, "exited unexpectedly"), (False, "timed out after 8")])
def test_a_batch_that_cannot_be_sent_ends_the_loader(guarded, message):
    """Without the guard the loader waits until its timeout; a training run sets none."""
    options = {"worker_init_fn": fail_loudly} if guarded else {}
    loader = DataLoader([1, 2], num_workers=1, collate_fn=unpicklable, timeout=60 if guarded else 8, **options)
    with pytest.raises(RuntimeError, match=message):
        next(iter(loader))


def test_a_temporary_folder_with_too_long_a_path_is_an_error(monkeypatch, tmp_path):
    require_short_tempdir()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 74)
    require_short_tempdir()
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 75)
    with pytest.raises(RecipeError, match=r"TMPDIR=/t+ has 76 bytes.*at most 75.*TMPDIR=/tmp"):
        require_short_tempdir()
