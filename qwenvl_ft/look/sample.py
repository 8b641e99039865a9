"""Measures the sample that training makes of a conversation, or reports why there is none."""

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
"""(reason, message) of a fault."""


@dataclass(slots=True)
class Measured:
    """Token counts of a sample."""

    tokens: int = 0
    """Length without ``max_length``; 0 if there is no sample or no model."""
    kept: int = 0
    """Length of the sample as trained on; 0 if it is dropped."""
    vision_tokens: int = 0
    """Image and video tokens of the sample as trained on."""
    supervised: int = 0
    """Supervised tokens of the sample as trained on."""
    encoded: bool = False
    """True if the sample was fully encoded, with pixels, as in training."""
    faults: list[Fault] = field(default_factory=list)


class SampleInspector:
    """Measures the samples of conversations, with the encoder's ``max_length`` and without it."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.whole = copy.copy(encoder)
        self.whole.max_length = None

    def cases(self, conversation: Conversation, seen: Measured, encode: bool) -> Iterator[Case]:
        """Yield all faults, and fill in the counts of ``seen``.

        Args:
            encode: encode the sample fully, with pixels.
        """
        try:
            draft = self.whole.draft(conversation)
        except Unsupervised:
            yield "unsupervised", "no assistant turn is supervised"
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
                yield (
                    "unsupervised",
                    f"{seen.tokens} tokens; none of the {draft.length} that are kept is supervised",
                )
                return
            yield "cut", f"{seen.tokens} tokens, of which {draft.length} are kept"
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


class GroupInspector:
    """Checks groups of dense captions as the first epoch draws them: joined, prompted and augmented.

    Args:
        unfit: indices of faulty records, which were reported already; their groups are skipped.
        encode: number of groups that are fully encoded, with pixels.
    """

    def __init__(self, encoder: Encoder, unfit: frozenset[int], encode: int) -> None:
        self.inspector = SampleInspector(encoder)
        self.unfit = unfit
        self.encode = encode

    def __call__(self, groups: DenseGroups, place: int) -> Measured:
        seen = Measured()
        if self.unfit.isdisjoint(groups.indices(0, place)):
            try:
                cases = list(self._cases(groups, place, seen))
            except Exception as error:  # one group must not stop the check
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
        yield from self.inspector.cases(conversation, seen, place < self.encode)


def _fault(groups: DenseGroups, place: int, reason: str, message: str) -> Fault:
    """Return a fault at the group's first record; the message names the others."""
    sources = [source for _, source, _ in groups.raw(0, place)]
    for source in sources:
        message = message.replace(f"{source}: ", "")
    others = f" (grouped with {', '.join(source.record for source in sources[1:])})" if sources[1:] else ""
    return Fault(reason, sources[0].record, message + others, sources[0].id)


@dataclass(frozen=True)
class SampleOptions:
    """Options by which a recipe turns dense captions into samples and augments images."""

    options: DenseOptions
    augmenter: Augmenter
    skip: bool = False
    """Leave out what cannot be read."""

    @classmethod
    def of(cls, recipe: Recipe) -> "SampleOptions":
        data = recipe.data
        options = DenseOptions.of(recipe, recipe.training.arguments["seed"])
        return cls(options, Augmenter.from_config(data.augmentation), data.skips_unreadable)

    @property
    def summaries(self) -> bool:
        """True if every dense caption needs a summary."""
        return self.options.draws_summaries

    def parts(
        self, records: Any, policy: MediaPolicy, *, training: bool
    ) -> tuple[list[tuple[Any, Epochs | None]], Fault | None]:
        """Split records into parts of one kind, each with its epochs of training (None if training refuses it).

        The fault concerns the records as a whole, not a single record.
        """
        try:
            epochs = open_epochs(
                records, self.options, augmenter=self.augmenter, training=training, policy=policy, skip=self.skip
            )
        except MovedTextError as error:
            where, _, message = str(error).partition(": ")
            return [(records, None)], Fault("structure", where, message)
        except DataError:  # the fault of one record, which is reported with that record
            return [(records, None)], None
        joined: Any = epochs.parts if isinstance(epochs, JoinedEpochs) else [epochs]
        return [(part.records, part) for part in joined], None
