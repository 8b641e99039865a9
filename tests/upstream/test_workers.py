"""upstream/workers.py: a lost item ends its worker, and persistent workers end when they are asked to."""

import multiprocessing
import multiprocessing.queues

from torch.utils.data import DataLoader

from qwenvl_ft.upstream import workers
from qwenvl_ft.upstream.workers import LOUD, PROMPT, end_with_lost_items, end_workers


def put(queue, item, ends):
    if ends:
        end_with_lost_items()
    queue.put(item() if callable(item) else item)
    queue.close()
    queue.join_thread()


class Stuck:
    """An object that cannot be pickled."""

    def __reduce__(self):
        raise OSError("too many open files")


def exit_code(item, *, ends):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=put, args=(context.Queue(), item, ends))
    process.start()
    process.join(20)
    return process.exitcode


def test_a_process_ends_where_an_item_is_lost(capfd):
    assert exit_code(Stuck, ends=True) == 1
    assert "too many open files" in capfd.readouterr().err


def test_by_itself_the_queue_goes_on_without_the_item():
    """The hook is necessary; if this fails, Python handles it by itself and upstream/workers.py can be removed."""
    assert exit_code(Stuck, ends=False) == 0


def test_a_python_without_the_hook_says_so_and_goes_on(monkeypatch):
    monkeypatch.delattr(multiprocessing.queues.Queue, workers.HOOK)
    workers._no_hook.cache_clear()
    assert LOUD.line() == (
        "dataloader workers that exit when a batch is lost: this Python has no Queue._on_queue_feeder_error; "
        "if a batch cannot be pickled, the error is only printed and the run waits for the batch"
    )
    end_with_lost_items()
    assert not hasattr(multiprocessing.queues.Queue, workers.HOOK)
    monkeypatch.undo()
    workers._no_hook.cache_clear()
    assert LOUD.missing() == ""


def test_persistent_workers_end_at_once_and_the_loader_starts_new_ones():
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert PROMPT.missing() == ""
    for _ in range(2):
        assert len(list(loader)) == 2
        children = multiprocessing.active_children()
        assert len(children) == 1, "vacuous: the worker does not outlive its epoch"
        end_workers(loader)
        assert not children[0].is_alive()
        assert children[0].exitcode == 0, "it was killed"
