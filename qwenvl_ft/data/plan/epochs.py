"""Defines the conversations of each epoch: the k-th one is a function of (seed, epoch, k) and nothing else.

An ordinary record is the same conversation in every epoch. Dense captions are grouped, sampled and augmented again
in each epoch. Epochs whose samples have the same lengths share one measurement.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from qwenvl_ft.data.augment.pipeline import Augmenter, Drawn
from qwenvl_ft.data.conversation import Conversation, Image, Message, Part, Source
from qwenvl_ft.data.dense.compose import dense_conversation
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.dense.groups import AUGMENTATION, DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.data.readers import read_to_dense
from qwenvl_ft.data.readers.dense import SINGLE_RECORD
from qwenvl_ft.data.sources.records import Records
from qwenvl_ft.errors import DataError

Raw = tuple[Any, Source, str | None]
"""A record, its origin, and the folder of its relative media."""


class Epochs(Protocol):
    """The conversations of all epochs; every epoch has the same number."""

    def __len__(self) -> int: ...

    def conversation(self, epoch: int, place: int) -> Conversation:
        """Return one conversation of an epoch.

        Raises:
            DataError: the record, or another record of its group, is malformed.
        """
        ...

    def raw(self, epoch: int, place: int) -> list[Raw]:
        """Return the records that the conversation is made from."""
        ...

    def measured_as(self, epoch: int) -> int:
        """Return the first epoch in which each sample has the same length as in this epoch."""
        ...

    def fingerprint(self, epoch: int) -> str:
        """Return a hash of everything in the records that an epoch's lengths depend on, for the keys of caches."""
        ...


class MovedTextError(DataError):
    """The augmentation moves pixels, and the records' text may hold coordinates."""


class RecordEpochs:
    """Epochs of records that each become one conversation.

    Args:
        records: a list whose ``[i]`` is (record, `Source`, folder of relative media), as `load_records` returns it.
        augmenter: may change colours only, because a record's text may hold coordinates.
        options: for dense-caption records among the others; each becomes a conversation by itself.

    Raises:
        MovedTextError: the augmenter moves pixels.
    """

    def __init__(
        self,
        records: Any,
        *,
        augmenter: Augmenter | None = None,
        policy: MediaPolicy | None = None,
        seed: int = 0,
        options: DenseOptions = SINGLE_RECORD,
    ) -> None:
        if augmenter is not None and augmenter.moving:
            raise MovedTextError(
                f"{_first_source(records)}: data.augmentation has {augmenter.moving[0]}, which moves pixels, but this "
                "is not a dense-caption record: coordinates in its text would become wrong. Use operations on colours "
                "only, or records with objects."
            )
        self.records = records
        self.augmenter = augmenter
        self.policy = policy or MediaPolicy()
        self.seed = seed
        self.options = options

    def __len__(self) -> int:
        return len(self.records)

    def conversation(self, epoch: int, place: int) -> Conversation:
        record, source, root = self.records[place]
        read = read_to_dense(record, source, root)
        if not isinstance(read, Conversation):
            if self.options.draws_summaries:
                raise DataError(
                    f"{source}: a dense-caption record in a file that begins with another format, where summaries "
                    "are not supported. Move it to a file of dense-caption records, or set data.summary_ratio=0."
                )
            read = dense_conversation([read_dense_record(read, source, root)], self.options, policy=self.policy)
        return read if self.augmenter is None else self._augmented(read, epoch, place)

    def raw(self, epoch: int, place: int) -> list[Raw]:
        return [self.records[place]]

    def measured_as(self, epoch: int) -> int:
        return 0

    def fingerprint(self, epoch: int) -> str:
        return hashlib.sha256(f"{self.records.fingerprint}:{self.options}".encode()).hexdigest()

    def _augmented(self, conversation: Conversation, epoch: int, place: int) -> Conversation:
        """Change the colours of all images of a record in the same way."""
        assert self.augmenter is not None
        drawn = self.augmenter.draw(1, 1, np.random.default_rng([AUGMENTATION, self.seed, epoch, place]), epoch)

        def coloured(part: Part) -> Part:
            return (
                replace(part, value=ColouredImage(part.value, drawn, self.policy)) if isinstance(part, Image) else part
            )

        def augmented(message: Message) -> Message:
            return replace(message, content=tuple(coloured(part) for part in message.content))

        return replace(conversation, messages=tuple(augmented(message) for message in conversation.messages))


@dataclass(frozen=True, slots=True)
class ColouredImage:
    """An image whose colours are augmented when it is opened."""

    value: Any
    """Path, URL, bytes or PIL image."""
    drawn: Drawn
    policy: MediaPolicy

    def size(self) -> tuple[int, int]:
        """Return (height, width), from the header."""
        return image_size(self.value, self.policy)

    def open(self) -> PILImage.Image:
        """Return the image with its colours changed."""
        return self.drawn.coloured(open_image(self.value, self.policy))


class JoinedEpochs:
    """Concatenates the conversations of several `Epochs`."""

    def __init__(self, parts: Sequence[Epochs]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def conversation(self, epoch: int, place: int) -> Conversation:
        part, place = self._part(place)
        return part.conversation(epoch, place)

    def raw(self, epoch: int, place: int) -> list[Raw]:
        part, place = self._part(place)
        return part.raw(epoch, place)

    def _part(self, place: int) -> tuple[Epochs, int]:
        number = bisect.bisect_right(self._ends, place)
        return self.parts[number], place - (self._ends[number - 1] if number else 0)

    def measured_as(self, epoch: int) -> int:
        return max(part.measured_as(epoch) for part in self.parts)

    def fingerprint(self, epoch: int) -> str:
        return hashlib.sha256("|".join(part.fingerprint(epoch) for part in self.parts).encode()).hexdigest()


def open_epochs(
    records: Any,
    options: DenseOptions | None = None,
    *,
    augmenter: Augmenter | None = None,
    training: bool = True,
    policy: MediaPolicy | None = None,
    skip: bool = False,
) -> Epochs:
    """Build the epochs of a data set.

    Files whose first record is a dense caption are grouped; in other files each record becomes one conversation, dense
    captions among them included.

    Args:
        training: False is for validation: the same conversations in every epoch, in order, never augmented.
        skip: pass over records that cannot be read, which raise when their conversation is asked for.

    Raises:
        DataError: the augmentation does not fit a file's format; or, without ``skip``, the first record of a file is
            malformed, or summaries are asked for and a record has none.
    """
    options = options or DenseOptions()
    augmenter = augmenter if training and augmenter is not None and augmenter.enabled else None
    parts: list[Epochs] = []
    for dense, run in _runs(records, skip):
        if dense:
            parts.append(DenseGroups(run, options, training=training, augmenter=augmenter, policy=policy, skip=skip))
        else:
            parts.append(RecordEpochs(run, augmenter=augmenter, policy=policy, seed=options.seed, options=options))
    return parts[0] if len(parts) == 1 else JoinedEpochs(parts)


def _runs(records: Any, skip: bool) -> Iterator[tuple[bool, Any]]:
    """Yield (is dense captions, records) for each run of consecutive files of the same kind."""
    if not isinstance(records, Records):
        yield _is_dense(records, skip), records
        return
    files = [Records([part]) for part in records.parts]
    for dense, run in groupby(files, lambda file: _is_dense(file, skip)):
        yield dense, Records([part for file in run for part in file.parts])


def _is_dense(records: Any, skip: bool) -> bool:
    """Return True if the first record is a dense caption, or read as one; with ``skip``, the first that can be read."""
    for index in range(len(records)):
        try:
            record, source, root = records[index]
            return not isinstance(read_to_dense(record, source, root), Conversation)
        except DataError:
            if not skip:
                raise
    return False


def _first_source(records: Any) -> str:
    """Return the origin of the first record that is not damaged."""
    for index in range(len(records)):
        try:
            return str(records[index][1])
        except DataError:
            continue
    return "every record is damaged"
