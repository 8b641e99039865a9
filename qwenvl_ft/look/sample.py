"""What a conversation becomes: the numbers of the sample that training will have, or why there is none."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Conversation
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.draft import Unsupervised, cut
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.plan.epochs import Epochs, JoinedEpochs, MovedTextError, open_epochs
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.faults import Fault
from qwenvl_ft.recipe.schema import Recipe

Case = tuple[str, str]
"""(reason, message)"""


@dataclass(slots=True)
class Measured:
    """The numbers of a sample."""

    tokens: int = 0
    """Of the sample as it would be without ``max_length``; 0 if there is none, or no model."""
    kept: int = 0
    """Of the sample that is trained on; 0 if it is left out."""
    vision_tokens: int = 0
    """Of the sample that is trained on; likewise below."""
    supervised: int = 0
    encoded: bool = False
    """Whether it was made with its pixels, as training does."""
    faults: list[Fault] = field(default_factory=list)


class SampleLook:
    """Measures conversations as the encoder will have them, and as they would be without ``max_length``."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.whole = copy.copy(encoder)
        self.whole.max_length = None

    def cases(self, conversation: Conversation, seen: Measured, encode: bool) -> Iterator[Case]:
        """Everything that is wrong; fills in the numbers.

        Args:
            encode: make the sample, pixels and all.
        """
        try:
            draft = self.whole.draft(conversation)
        except Unsupervised:
            yield "unsupervised", "no assistant turn is learned from"
            return
        except DataError as error:
            yield "encoding", str(error)
            return
        seen.tokens, limit, strategy = draft.length, self.encoder.max_length, self.encoder.truncation_strategy
        if limit is not None and draft.length > limit:
            if strategy not in ("left", "right"):
                yield "too_long", f"{draft.length} tokens, template.max_length is {limit}"
                return
            draft = cut(draft, limit, strategy)
            if not draft.supervised[1:].any():
                yield "unsupervised", f"{seen.tokens} tokens; nothing is learned in the {draft.length} that are kept"
                return
            yield "cut", f"{seen.tokens} tokens, {draft.length} of them are kept"
        seen.kept = draft.length
        seen.vision_tokens = int(draft.counts[draft.widths > 0].sum())
        seen.supervised = int((draft.supervised * draft.counts)[1:].sum())
        if encode:
            try:
                sample = self.encoder(conversation)
            except DataError as error:
                yield "encoding", str(error)
                return
            seen.encoded = True
            if len(sample["input_ids"]) != seen.kept:
                yield "encoding", f"planned with {seen.kept} tokens, encoded to {len(sample['input_ids'])}"


class GroupLook:
    """Looks at groups of dense captions as the first epoch draws them: joined, asked in their mode, augmented.

    Args:
        unfit: indices of records that have faults of their own, which were told; their groups are passed over.
        encode: so many of the groups are made samples, pixels and all.
    """

    def __init__(self, encoder: Encoder, unfit: frozenset[int], encode: int) -> None:
        self.look = SampleLook(encoder)
        self.unfit = unfit
        self.encode = encode

    def __call__(self, groups: DenseGroups, place: int) -> Measured:
        seen = Measured()
        if self.unfit.isdisjoint(groups.indices(0, place)):
            try:
                cases = list(self._cases(groups, place, seen))
            except Exception as error:  # what nobody foresaw of one group must not hide the others
                cases = [("unforeseen", f"{type(error).__name__}: {error}")]
            if cases:
                seen.faults = [_fault(groups, place, *case) for case in cases]
        return seen

    def _cases(self, groups: DenseGroups, place: int, seen: Measured) -> Iterator[Case]:
        try:
            conversation = groups.conversation(0, place)
        except DataError as error:
            yield "encoding", str(error)
            return
        yield from self.look.cases(conversation, seen, place < self.encode)


def _fault(groups: DenseGroups, place: int, reason: str, told: str) -> Fault:
    """A fault of a group, where its first record stands; the others are named in the message."""
    sources = [source for _, source, _ in groups.raw(0, place)]
    for source in sources:
        told = told.replace(f"{source}: ", "")
    others = f" (asked together with {', '.join(source.record for source in sources[1:])})" if sources[1:] else ""
    return Fault(reason, sources[0].record, told + others, sources[0].id)


@dataclass(frozen=True)
class Drawing:
    """How a recipe makes samples of dense captions, and changes images."""

    options: DenseOptions
    augmenter: Augmenter

    @classmethod
    def of(cls, recipe: Recipe) -> "Drawing":
        return cls(
            DenseOptions.of(recipe, recipe.training.arguments["seed"]), Augmenter.from_config(recipe.data.augmentation)
        )

    @property
    def summaries(self) -> bool:
        """Whether every dense caption needs a summary."""
        return self.options.draws_summaries

    def parts(
        self, records: Any, policy: MediaPolicy, *, training: bool
    ) -> tuple[list[tuple[Any, Epochs | None]], Fault | None]:
        """Records that are alike, each with what training makes of them: None where it refuses them.

        The fault is one that none of the records has by itself.
        """
        try:
            epochs = open_epochs(records, self.options, augmenter=self.augmenter, training=training, policy=policy)
        except MovedTextError as error:
            where, _, told = str(error).partition(": ")
            return [(records, None)], Fault("structure", where, told)
        except DataError:  # a record's own fault, which is told of it
            return [(records, None)], None
        joined: Any = epochs.parts if isinstance(epochs, JoinedEpochs) else [epochs]
        return [(part.records, part) for part in joined], None
