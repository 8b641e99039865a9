"""Group dense-caption records for each epoch; members, mode and augmentation depend on (seed, epoch, group) alone.

Neither the number of dataloader workers nor the order of access changes a group; a resumed run gets the same groups as
an uninterrupted one.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from qwenvl_ft.data.augment.pipeline import Augmenter, Drawn
from qwenvl_ft.data.conversation import Conversation, Source
from qwenvl_ft.data.dense.compose import dense_conversation
from qwenvl_ft.data.dense.dense_record import DenseRecord, read_dense_record
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.dense.prompts import DENSE, SUMMARY
from qwenvl_ft.data.dense.summary import summary_fault
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.readers import read_to_dense
from qwenvl_ft.errors import DataError

LAYOUT = 2
"""Version for cache keys; raise it when the same options, seed and epoch give different conversations."""
ORDER, MODE, AUGMENTATION = range(1, 4)
"""Streams of random numbers. They come first in the seed, because numpy treats [s, e] and [s, e, 0] as equal."""


class RecordList(Protocol):
    """The part of `qwenvl_ft.data.sources.records.Records` that groups need."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Source, str | None]: ...


def _rng(stream: int, *key: int) -> Generator:
    return np.random.default_rng([stream, *key])


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Return int64[count]: the indices of the records in the epoch's order."""
    return _rng(ORDER, seed, epoch).permutation(count) if shuffle else np.arange(count)


def epoch_groups(
    count: int, group_size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[list[int]]:
    """Divide the records of an epoch into consecutive groups; the last may be smaller.

    Example:
        Without ``shuffle``, 5 records in groups of 2 are ``[[0, 1], [2, 3], [4]]``.
    """
    order = epoch_order(count, seed=seed, epoch=epoch, shuffle=shuffle).tolist()
    return [order[begin : begin + group_size] for begin in range(0, count, group_size)]


def draw_mode(options: DenseOptions, epoch: int, group: int) -> str:
    """Draw the mode of a group: ``dense`` or ``summary``."""
    ratio = options.summary_ratio or 0.0
    return SUMMARY if _rng(MODE, options.seed, epoch, group).random() < ratio else DENSE


class DenseGroups:
    """The groups of a data set of dense-caption records, epoch by epoch.

    Args:
        records: a list whose ``[i]`` is (record, `Source`, folder of relative media), as `load_records` gives it.
        training: False is validation: records in file order, always as in epoch 0 and without augmentation, so that
            the losses of different epochs can be compared.
        augmenter: changes images and coordinates; None changes nothing.
        policy: limits on opening media.
        skip: a record without a valid summary makes its group unreadable if the group asks for summaries.

    Raises:
        DataError: there are no records; or, without ``skip``, groups may ask for summaries and some records have no
            valid one.
    """

    def __init__(
        self,
        records: RecordList,
        options: DenseOptions,
        *,
        training: bool = True,
        augmenter: Augmenter | None = None,
        policy: MediaPolicy | None = None,
        skip: bool = False,
    ) -> None:
        if not len(records):
            raise DataError("there are no dense-caption records.")
        self.records = records
        self.options = options
        self.training = training
        self.augmenter = augmenter if training else None
        self.policy = policy or MediaPolicy()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        if options.draws_summaries and not skip:
            require_summaries(records)

    def __len__(self) -> int:
        """Return the number of groups, which is the same in every epoch."""
        size = self.options.images_per_user_turn
        return (len(self.records) + size - 1) // size

    @property
    def varies(self) -> bool:
        """Return True if epochs differ in the members of groups, in their modes, or in the objects' coordinates."""
        mixed_modes = self.options.draws_summaries and self.options.summary_ratio != 1
        moves_objects = self.augmenter is not None and bool(self.augmenter.moving)
        return self.training and (self.options.images_per_user_turn > 1 or mixed_modes or moves_objects)

    def measured_as(self, epoch: int) -> int:
        """Return the first epoch with the same sample lengths; colour operations change no length."""
        return epoch if self.varies else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}  # recomputed on demand, which keeps the pickle small

    def indices(self, epoch: int, group: int) -> list[int]:
        """Return the indices of a group's records, in order."""
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} of {len(self)}")
        epoch = self._effective_epoch(epoch)
        if self._order is None or self._order[0] != epoch:
            shuffle = (
                self.training and self.options.images_per_user_turn > 1
            )  # groups of one record are shuffled by the plan
            order = epoch_order(len(self.records), seed=self.options.seed, epoch=epoch, shuffle=shuffle)
            self._order = epoch, order
        size = self.options.images_per_user_turn
        return self._order[1][group * size : (group + 1) * size].tolist()

    def mode(self, epoch: int, group: int) -> str:
        """Return the mode of a group: ``dense`` or ``summary``."""
        return draw_mode(self.options, self._effective_epoch(epoch), group)

    def group_records(self, epoch: int, group: int) -> list[DenseRecord]:
        """Return the records of a group, checked.

        Raises:
            DataError: a record is malformed.
        """
        return [self._record(*entry) for entry in self.raw(epoch, group)]

    def raw(self, epoch: int, group: int) -> list[tuple[Any, Source, str | None]]:
        """Return the unchecked records of a group, each with its source and the folder of its media."""
        return [self.records[index] for index in self.indices(epoch, group)]

    def conversation(self, epoch: int, group: int) -> Conversation:
        """Return the conversation of a group.

        Raises:
            DataError: a record is malformed.
        """
        records = self.group_records(epoch, group)
        indices = self.indices(epoch, group)
        drawn = [self._augmentation(record, index, epoch) for record, index in zip(records, indices, strict=True)]
        return dense_conversation(records, self.options, self.mode(epoch, group), drawn=drawn, policy=self.policy)

    def conversations(self, epoch: int) -> "EpochConversations":
        """Return the conversations of all groups of an epoch."""
        return EpochConversations(self, epoch)

    def fingerprint(self, epoch: int) -> str:
        """Return the cache key of an epoch's sample lengths: a hash of everything that they depend on."""
        same_epoch = self.measured_as(epoch)
        state = (LAYOUT, self.records.fingerprint, self.options, self.training, self.augmenter, same_epoch)
        return hashlib.sha256(repr(state).encode()).hexdigest()

    def _effective_epoch(self, epoch: int) -> int:
        return epoch if self.training else 0

    @staticmethod
    def _record(record: Any, source: Source, root: str | None) -> DenseRecord:
        dense = read_to_dense(record, source, root)
        if isinstance(dense, Conversation):
            raise DataError(
                f"{source}: not a dense-caption record (keys {', '.join(map(str, record))}), although its file begins "
                "with one. Use one file per format."
            )
        return read_dense_record(dense, source, root)

    def _augmentation(self, record: DenseRecord, index: int, epoch: int) -> Drawn | None:
        if self.augmenter is None:
            return None
        return self.augmenter.draw(*record.size, _rng(AUGMENTATION, self.options.seed, epoch, index), epoch)


class EpochConversations(Sequence[Conversation]):
    """The conversations of one epoch, built on access.

    Args:
        groups: `DenseGroups`, or any `Epochs` (data/plan/epochs.py).
    """

    def __init__(self, groups: Any, epoch: int) -> None:
        self.groups = groups
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group: Any) -> Any:
        if isinstance(group, slice):
            return [self[k] for k in range(*group.indices(len(self)))]
        return self.groups.conversation(self.epoch, group + len(self) if group < 0 else group)

    @property
    def fingerprint(self) -> str:
        """Cache key of the conversations."""
        return self.groups.fingerprint(self.epoch)


def require_summaries(records: RecordList) -> None:
    """Check the summaries of all records before the first step.

    Raises:
        DataError: some records have no valid summary; the message gives their number, the first one and its fault.
    """
    invalid, first = 0, ""
    for index in range(len(records)):
        record, source, _ = records[index]
        if fault := summary_fault(record.get("summary") if isinstance(record, dict) else None):
            invalid += 1
            first = first or f"{source}: {fault}"
    if invalid:
        raise DataError(
            f"{invalid} of {len(records)} records have no valid 'summary', which data.summary_ratio above 0 needs; the "
            f"first is {first}. Write one line of words about each image, or set data.summary_ratio=0."
        )
