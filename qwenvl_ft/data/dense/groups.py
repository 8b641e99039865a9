"""Which records are asked about together, and in which mode: a function of (seed, epoch, group) alone.

Neither the number of workers nor the order in which groups are asked for changes anything; a resumed run gets the same
groups as one that never stopped.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

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
"""Raised whenever the same options, seed and epoch begin to give other conversations."""
ORDER, MODE, AUGMENTATION = range(1, 4)
"""Streams of random numbers. First in the seed, because numpy takes [s, e] and [s, e, 0] for the same."""


def _rng(stream: int, *key: int) -> Generator:
    return np.random.default_rng([stream, *key])


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """int64[count], the records in the epoch's order."""
    return _rng(ORDER, seed, epoch).permutation(count) if shuffle else np.arange(count)


def epoch_groups(
    count: int, group_size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[list[int]]:
    """All records of an epoch in consecutive groups; the last may be smaller.

    Example:
        Without ``shuffle``, 5 records in groups of 2 are ``[[0, 1], [2, 3], [4]]``.
    """
    order = epoch_order(count, seed=seed, epoch=epoch, shuffle=shuffle).tolist()
    return [order[begin : begin + group_size] for begin in range(0, count, group_size)]


def draw_mode(options: DenseOptions, epoch: int, group: int) -> str:
    """``dense`` or ``summary`` for a whole group."""
    ratio = options.summary_ratio or 0.0
    return SUMMARY if _rng(MODE, options.seed, epoch, group).random() < ratio else DENSE


class DenseGroups:
    """The groups of a data set of dense-caption records, epoch by epoch.

    Args:
        records: a list whose ``[i]`` is (record, `Source`, folder of relative media), as `load_records` gives it.
        training: False is validation: the records in their order, always as in epoch 0, without augmentation, so that
            losses of different epochs can be compared.
        augmenter: what changes images and coordinates; None for nothing.
        policy: what media may be opened.

    Raises:
        DataError: there is no record, or summaries are drawn and some records have no valid one.
    """

    def __init__(
        self,
        records: Any,
        options: DenseOptions,
        *,
        training: bool = True,
        augmenter: Augmenter | None = None,
        policy: MediaPolicy | None = None,
    ) -> None:
        if not len(records):
            raise DataError("there is no dense-caption record.")
        self.records = records
        self.options = options
        self.training = training
        self.augmenter = augmenter if training else None
        self.policy = policy or MediaPolicy()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        if options.draws_summaries:
            require_summaries(records)

    def __len__(self) -> int:
        """Groups of an epoch: the same in all of them."""
        size = self.options.images_per_user_turn
        return (len(self.records) + size - 1) // size

    @property
    def varies(self) -> bool:
        """Whether epochs differ in which records meet, what they are asked, or where their objects are."""
        drawn = self.options.draws_summaries and self.options.summary_ratio != 1
        moved = self.augmenter is not None and bool(self.augmenter.moving)
        return self.training and (self.options.images_per_user_turn > 1 or drawn or moved)

    def measured_as(self, epoch: int) -> int:
        """The first epoch whose samples have the same lengths; colours change no length."""
        return epoch if self.varies else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}  # made again where it is needed; a pickle stays small

    def indices(self, epoch: int, group: int) -> list[int]:
        """Which records a group has, in its order."""
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} of {len(self)}")
        epoch = self._counted(epoch)
        if self._order is None or self._order[0] != epoch:
            shuffle = self.training and self.options.images_per_user_turn > 1  # the plan shuffles single records
            order = epoch_order(len(self.records), seed=self.options.seed, epoch=epoch, shuffle=shuffle)
            self._order = epoch, order
        size = self.options.images_per_user_turn
        return self._order[1][group * size : (group + 1) * size].tolist()

    def mode(self, epoch: int, group: int) -> str:
        """``dense`` or ``summary``."""
        return draw_mode(self.options, self._counted(epoch), group)

    def group_records(self, epoch: int, group: int) -> list[DenseRecord]:
        """The records of a group, checked.

        Raises:
            DataError: a record is malformed.
        """
        return [self._record(*told) for told in self.raw(epoch, group)]

    def raw(self, epoch: int, group: int) -> list[tuple[Any, Source, str | None]]:
        """The records of a group as they are stored, each with its source and the folder of its media."""
        return [self.records[index] for index in self.indices(epoch, group)]

    def conversation(self, epoch: int, group: int) -> Conversation:
        """What a group is asked and answers.

        Raises:
            DataError: a record is malformed.
        """
        records = self.group_records(epoch, group)
        chosen = self.indices(epoch, group)
        drawn = [self._drawn(record, index, epoch) for record, index in zip(records, chosen, strict=True)]
        return dense_conversation(records, self.options, self.mode(epoch, group), drawn=drawn, policy=self.policy)

    def conversations(self, epoch: int) -> "EpochConversations":
        """All groups of an epoch."""
        return EpochConversations(self, epoch)

    def fingerprint(self, epoch: int) -> str:
        """Key of all that the lengths of an epoch's conversations follow from, for caches."""
        key = self.measured_as(epoch)
        told = (LAYOUT, self.records.fingerprint, self.options, self.training, self.augmenter, key)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _counted(self, epoch: int) -> int:
        return epoch if self.training else 0

    @staticmethod
    def _record(record: Any, source: Source, root: str | None) -> DenseRecord:
        told = read_to_dense(record, source, root)
        if isinstance(told, Conversation):
            raise DataError(
                f"{source}: no dense-caption record (keys {', '.join(map(str, record))}), though its file begins with "
                "one. Keep the formats in files of their own."
            )
        return read_dense_record(told, source, root)

    def _drawn(self, record: DenseRecord, index: int, epoch: int) -> Drawn | None:
        if self.augmenter is None:
            return None
        return self.augmenter.draw(*record.size, _rng(AUGMENTATION, self.options.seed, epoch, index), epoch)


class EpochConversations(Sequence[Conversation]):
    """The conversations of an epoch of groups, or of any `Epochs`, each made when it is asked for."""

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
        """Key of the conversations, for caches."""
        return self.groups.fingerprint(self.epoch)


def require_summaries(records: Any) -> None:
    """Look through all records before the first step.

    Raises:
        DataError: some have no valid summary; it says how many, which is the first, and why.
    """
    wrong, first = 0, ""
    for index in range(len(records)):
        record, source, _ = records[index]
        if fault := summary_fault(record.get("summary") if isinstance(record, dict) else None):
            wrong += 1
            first = first or f"{source}: {fault}"
    if wrong:
        raise DataError(
            f"{wrong} of {len(records)} records have no valid 'summary', which data.summary_ratio above 0 needs; the "
            f"first is {first}. Write one line of words about each image, or set data.summary_ratio=0."
        )
