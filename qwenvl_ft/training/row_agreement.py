"""Do the ranks that train a row together have the same row? They agree before the row is trained.

An image is decoded by the rank that owns it, so only that rank learns that it is damaged; and a disk may fail to answer
one rank alone. If the ranks went on with rows of their own, they would wait for each other forever, or place features
wrongly. So they compare two numbers for each sample: a hash, and whether it has a fault. Then all of them leave out the
same samples, as a run does in which one rank reads everything.

The comparison uses the CPU only, so that no GPU is waited for. Letters: N ranks of a group, S samples of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from qwenvl_ft.data.conversation import IGNORE, Sample
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.share import RowCheck
from qwenvl_ft.errors import DataError
from qwenvl_ft.model.sequence_parallel import own_group

SOUND, LEFT_OUT, FAULTY = range(3)
"""State of a sample on a rank: as planned; left out because the others could not read it; not readable here."""


class RowAgreement:
    """Makes the batches of a group's ranks agree.

    Args:
        place: place of this rank in its group.
        gather: int64[S, 2] of this rank -> int64[N, S, 2] of all ranks in order.
    """

    def __init__(self, place: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.place = place
        self.gather = gather

    @classmethod
    def of(cls, size: int, timeout: timedelta | None = None) -> "RowAgreement":
        """Return the agreement of consecutive ``size`` ranks. Every rank of the run must call it."""
        group = own_group(size, timeout, backend="gloo")

        def gather(own: Tensor) -> Tensor:
            every = [torch.empty_like(own) for _ in range(size)]
            dist.all_gather(every, own, group=group)
            return torch.stack(every)

        return cls(dist.get_rank() % size, gather)

    def __call__(
        self, batch: dict[str, Any], dataset: SampleDataset, collate: Callable[[Sequence[Sample]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a batch that is the same row on all ranks of the group.

        A sample that any rank could not read has no labels on any rank. If ranks read different tokens or sizes of
        media, the row is made again without that sample's content. ``faults`` has each fault on one rank only.

        Args:
            batch: from ``collate``.
            dataset: made the batch; it is `shared`.
            collate: as for the loader of ``dataset``.

        Raises:
            DataError: the ranks read different content, and ``dataset.on_error`` is ``raise``; on every rank of the
                group.
        """
        found: dict[int, str] = dict(batch["check"].faults)
        left_out: dict[int, str] = {}
        while True:
            check: RowCheck = batch["check"]
            found |= {k: fault for k, fault in check.faults.items() if k not in left_out}
            every = self.gather(_state(check, found))
            disputed = (every[:, :, 0] != every[0, :, 0]).any(dim=0).nonzero().flatten().tolist()
            if not disputed:
                return self._settled(
                    batch, every[:, :, 1], found | {k: left_out[k] for k in left_out if k not in found}
                )
            if dataset.on_error == "raise":
                _refuse(batch, disputed[0])
            assert not left_out.keys() & set(disputed), "a sample that is left out is the same on every rank"
            left_out |= {k: found.get(k) or _differs(batch, k) for k in disputed}
            batch = collate(dataset.row(check.tickets, left_out))

    def _settled(self, batch: dict[str, Any], states: Tensor, reasons: Mapping[int, str]) -> dict[str, Any]:
        """Remove the labels of faulty samples, and keep the faults that this rank reports.

        Args:
            states: int64[N, S]
        """
        worst, reporter = states.max(dim=0).values.tolist(), states.numpy().argmax(axis=0)  # the first rank reports
        borders = batch["cu_seq_lens_q"].tolist()
        faults = []
        for sample in (k for k, state in enumerate(worst) if state != SOUND):
            batch["labels"][:, borders[sample] : borders[sample + 1]] = IGNORE
            if reporter[sample] == self.place:
                faults.append(reasons[sample])
        batch.pop("faults", None)
        return batch | ({"faults": faults} if faults else {})


def _state(check: RowCheck, found: Mapping[int, str]) -> Tensor:
    """Return int64[S, 2]: hash and state of each sample on this rank."""
    states = [FAULTY if k in found else LEFT_OUT if k in check.faults else SOUND for k in range(len(check.digests))]
    return torch.tensor([check.digests, states], dtype=torch.int64).T.contiguous()


def _differs(batch: dict[str, Any], sample: int) -> str:
    return f"{batch['sources'][sample]}: another rank that trains this row reads it differently"


def _refuse(batch: dict[str, Any], sample: int) -> NoReturn:
    raise DataError(
        f"{batch['sources'][sample]}: the processes that train this row together read different content. Check that "
        "every machine has the same data and media files, and start again; or set data.on_error=skip."
    )
