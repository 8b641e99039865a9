"""What a data set shows, epoch by epoch: the k-th conversation as a function of (seed, epoch, k) and nothing else.

Records stand for themselves, in every epoch alike; dense captions are grouped, drawn and augmented anew. An epoch's
lengths are measured once for all epochs that have the same.
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
"""A record, where it came from, and the folder of its relative media."""


class Epochs(Protocol):
    """The conversations of all epochs; as many in each."""

    def __len__(self) -> int: ...

    def conversation(self, epoch: int, place: int) -> Conversation:
        """Raises DataError: the record, or one of the group, is malformed."""
        ...

    def raw(self, epoch: int, place: int) -> list[Raw]:
        """What the conversation is made from."""
        ...

    def measured_as(self, epoch: int) -> int:
        """The first epoch whose samples have the same lengths, place by place."""
        ...

    def fingerprint(self, epoch: int) -> str:
        """Key of all that an epoch's lengths follow from, for caches."""
        ...


class MovedTextError(DataError):
    """The augmentation moves pixels of records whose text may name places."""


class RecordEpochs:
    """Records that are a conversation each.

    Args:
        records: a list whose ``[i]`` is (record, `Source`, folder of relative media), as `load_records` gives it.
        augmenter: changes the colours of images; what moves pixels is refused, because text may name places.
        options: of dense-caption records among the others; each is asked for its objects by itself.

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
                f"{records[0][1]}: data.augmentation has {augmenter.moving[0]}, which moves pixels, and this is no "
                "dense-caption record: what its text says of places would be wrong. Keep the operations on colours, "
                "or give records with objects."
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
        told = read_to_dense(record, source, root)
        if not isinstance(told, Conversation):
            if self.options.draws_summaries:
                raise DataError(
                    f"{source}: a dense-caption record in a file that begins with another format, of which no summary "
                    "is asked. Put it into a file of such records, or set data.summary_ratio=0."
                )
            told = dense_conversation([read_dense_record(told, source, root)], self.options, policy=self.policy)
        return told if self.augmenter is None else self._augmented(told, epoch, place)

    def raw(self, epoch: int, place: int) -> list[Raw]:
        return [self.records[place]]

    def measured_as(self, epoch: int) -> int:
        return 0

    def fingerprint(self, epoch: int) -> str:
        return hashlib.sha256(f"{self.records.fingerprint}:{self.options}".encode()).hexdigest()

    def _augmented(self, conversation: Conversation, epoch: int, place: int) -> Conversation:
        """All images of a record change alike."""
        assert self.augmenter is not None
        drawn = self.augmenter.draw(1, 1, np.random.default_rng([AUGMENTATION, self.seed, epoch, place]), epoch)

        def shown(part: Part) -> Part:
            return (
                replace(part, value=ColouredImage(part.value, drawn, self.policy)) if isinstance(part, Image) else part
            )

        def told(message: Message) -> Message:
            return replace(message, content=tuple(shown(part) for part in message.content))

        return replace(conversation, messages=tuple(told(message) for message in conversation.messages))


@dataclass(frozen=True, slots=True)
class ColouredImage:
    """An image whose colours change when it is opened."""

    value: Any
    """Path, URL, bytes or PIL image."""
    drawn: Drawn
    policy: MediaPolicy

    def size(self) -> tuple[int, int]:
        """(height, width), from the header."""
        return image_size(self.value, self.policy)

    def open(self) -> PILImage.Image:
        return self.drawn.coloured(open_image(self.value, self.policy))


class JoinedEpochs:
    """Several one behind the other."""

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
) -> Epochs:
    """What a data set shows: groups of the files whose first record is a dense caption, the others' records alone.

    A dense caption in one of the other files is asked for its objects by itself.

    Args:
        training: False is validation: the same in every epoch, in order, never augmented.

    Raises:
        DataError: the first record of a file is malformed, the augmentation does not fit a file's format, or summaries
            are drawn and a record has none.
    """
    options = options or DenseOptions()
    augmenter = augmenter if training and augmenter is not None and augmenter.enabled else None
    parts: list[Epochs] = []
    for dense, run in _runs(records):
        if dense:
            parts.append(DenseGroups(run, options, training=training, augmenter=augmenter, policy=policy))
        else:
            parts.append(RecordEpochs(run, augmenter=augmenter, policy=policy, seed=options.seed, options=options))
    return parts[0] if len(parts) == 1 else JoinedEpochs(parts)


def _runs(records: Any) -> Iterator[tuple[bool, Any]]:
    """(are they dense captions, records) of consecutive files that are alike."""
    if not isinstance(records, Records):
        yield _is_dense(records), records
        return
    files = [Records([part]) for part in records.parts]
    for dense, alike in groupby(files, _is_dense):
        yield dense, Records([part for file in alike for part in file.parts])


def _is_dense(records: Any) -> bool:
    """Whether the first record is a dense caption, or becomes one."""
    record, source, root = records[0]
    return not isinstance(read_to_dense(record, source, root), Conversation)
