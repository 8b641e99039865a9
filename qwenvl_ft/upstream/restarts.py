"""Lets the ranks that torchrun has restarted find each other, and not the processes of an earlier start.

Since torch 2.5, torchrun keeps one store for all starts of a run, in which the processes leave their addresses. A rank
that is restarted may read the address of a process that was killed, and fails ("Connection refused", pytorch issues
135712 and 167288). `meet_anew` gives each start a store of its own on rank 0.

Relies on ``TORCHELASTIC_USE_AGENT_STORE``, by which torchrun asks its processes to use its store, torch 2.5 to 2.15,
not documented; the other variables are. Without it nothing is changed.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

SHARED = "TORCHELASTIC_USE_AGENT_STORE"
PAUSE = 0.02
"""Seconds between two looks at the store."""
_open: list[dist.Store] = []
"""Rank 0's stores, which are open as long as its process runs."""


def meet_anew(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Replace torchrun's store by one of this start. It must be called by all ranks, before they are joined.

    Only a launcher that may start processes again (``--max-restarts``) is concerned.

    Args:
        timeout: how long rank 0 waits for the others, and they for rank 0.

    Raises:
        TimeoutError: rank 0 did not hear of all others.
        torch.distributed.DistError: another rank did not hear of rank 0.
    """
    if dist.is_available() and dist.is_initialized():  # a second run of the same processes
        return
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or os.environ.get(SHARED) != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.PrefixStore("qwenvl_ft", dist.TCPStore(host, port, is_master=False, timeout=timeout))
    os.environ[SHARED] = "False"
    os.environ["MASTER_PORT"] = str(
        _serve(shared, host, ranks, timeout) if rank == 0 else _ask(shared, host, rank, timeout)
    )


def _serve(shared: dist.Store, host: str, ranks: int, timeout: timedelta) -> int:
    """Open a store; answer the word of each rank by its port until all have come.

    The first words found may be those of an earlier start: they are answered too, and nobody reads the answer.
    """
    store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    _open.append(store)
    answered: set[bytes] = set()
    end = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, ranks))
    while missing := [rank for rank in missing if not store.check([f"here {rank}"])]:
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout}, ranks {missing} have not come to this start of the run")
        for name in (f"word {rank}" for rank in missing):
            if shared.check([name]) and (word := shared.get(name)) not in answered:
                answered.add(word)
                shared.set(f"port for {word.decode()}", str(store.port))
        time.sleep(PAUSE)
    return store.port


def _ask(shared: dist.Store, host: str, rank: int, timeout: timedelta) -> int:
    """Say a new word, and return the port that rank 0 answers."""
    word = uuid.uuid4().hex
    shared.set(f"word {rank}", word)
    port = int(shared.get(f"port for {word}"))
    dist.TCPStore(host, port, is_master=False, timeout=timeout).set(f"here {rank}", "")
    return port
