"""How several ranks stop together: what one of them meets (a signal, a broken record) reaches all.

A rank that raised an error alone would leave the others waiting for it in the next exchange of gradients, until their
launcher kills them; whatever was not saved by then is lost.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from qwenvl_ft.checkpoint.lock import only_run_in
from qwenvl_ft.errors import QwenVLError, one_line

Value = TypeVar("Value")


class OtherRankError(QwenVLError):
    """Another rank has met an error that is not the user's; it raises that error itself."""


class Agreement:
    """Exchanges small facts between all ranks, by their CPUs; with one rank it costs nothing.

    All ranks must make an `Agreement` at the same time, and must call its methods in the same order.

    Args:
        timeout: how long a rank waits for the others; None is torch's default, 30 minutes.
    """

    def __init__(self, world_size: int, timeout: timedelta | None = None) -> None:
        self.world_size = world_size
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self._shared: BaseException | None = None

    @classmethod
    def of(cls, args: TrainingArguments) -> "Agreement":
        """Return the agreement of a run's ranks, which wait for ``training.ddp_timeout`` as in its other exchanges."""
        return cls(args.world_size, timedelta(seconds=args.ddp_timeout))

    def largest(self, number: int) -> int:
        """Return the largest number of all ranks."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def together(self, action: Callable[[], Value]) -> Value:
        """Call a function on every rank and return its result; an error on one rank is raised on all.

        Raises:
            QwenVLError: if the first error is one: that of the earliest step, and of those that of the first rank. Any
                other error is raised as it is on its own rank, and as an `OtherRankError` that names the first such
                rank on the others.
        """
        error, result = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        if self.largest(int(error is not None)):
            self._shared = error = self._first(error)
            raise error
        return result  # type: ignore[return-value]

    def is_shared(self, error: BaseException) -> bool:
        """Return True if every rank raises this error or its like now."""
        return self.world_size == 1 or error is self._shared

    def _first(self, own: Exception | None) -> Exception:
        """Return what this rank raises: the first error of all ranks, or its own that is not the user's."""
        if self._group is None:
            assert own is not None
            return own
        errors: list[Any] = [None] * self.world_size
        dist.all_gather_object(errors, own and _sent(own), group=self._group)
        raised = [(rank, entry) for rank, entry in enumerate(errors) if entry is not None]
        rank, (kind, text, _) = min(raised, key=lambda found: found[1][2])
        if issubclass(kind, QwenVLError):
            return own if own is not None and rank == dist.get_rank() else kind(text)
        if own is not None and not isinstance(own, QwenVLError):
            return own
        return OtherRankError(f"rank {rank} stopped: {text}.")


def _sent(error: Exception) -> tuple[type[Exception], str, int]:
    """Return the type, message and step of an error, to send them to other ranks; step 0 if it has none."""
    if isinstance(error, QwenVLError):
        return type(error), str(error), getattr(error, "step", 0)
    return Exception, f"{type(error).__name__}: {one_line(error)}", 0


@contextmanager
def only_run_of(ranks: Agreement, folder: Path, *, on_rank_0: bool) -> Iterator[None]:
    """Let rank 0 lock the folder of a run inside the context (see `only_run_in`).

    Raises:
        CheckpointError: another run writes into it; on every rank.
    """
    with ExitStack() as stack:

        def lock() -> None:
            if on_rank_0:
                stack.enter_context(only_run_in(folder, lambda line: print(line, flush=True)))

        ranks.together(lock)
        yield
