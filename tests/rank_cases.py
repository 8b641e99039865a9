"""Runs a function in several ranks that are forked from the test's process, so that nothing is imported again."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

torch.ones(1, requires_grad=True).sum().backward()
# autograd counts the devices in its first backward pass, and a process that finds one cannot be forked any more. After
# torch.compile it finds one on a CPU too, so the first pass is here, before any test.

SECONDS = 240
"""A collective operation that waits longer for another rank is an error."""


def in_ranks(count, function, *arguments):
    """Call ``function(*arguments)`` in ``count`` ranks of a gloo group, and return what each returned.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, count, port, Path(folder), function, arguments))
            for rank in range(count)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        files = [Path(folder) / str(rank) for rank in range(count)]
        found = [torch.load(file, weights_only=False) for file in files if file.is_file()]
    failures = [text for text, _ in found if text]
    if failures or len(found) < count:
        raise RuntimeError(failures[0] if failures else f"exit codes {[rank.exitcode for rank in ranks]}")
    return [value for _, value in found]


def _rank(rank, count, port, folder, function, arguments):
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (places | address).items()})
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
        result = "", function(*arguments)
    except BaseException:
        result = traceback.format_exc(), None
    torch.save(result, folder / str(rank))
    os._exit(bool(result[0]))  # without waiting for ranks that failed, and without pytest's own ending
