"""Makes one rank's share of the samples of a row that several ranks train together (sequence parallelism).

Every rank of such a group makes the same tokens, labels and positions from text and media headers. The frames (images,
and pairs of a video's frames) are dealt out by their estimated time in the vision tower, and each rank decodes only its
own. A rank that cannot read a record still makes as many tokens as planned, so that its row is as long as the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Sample
from qwenvl_ft.data.encode.draft import Draft
from qwenvl_ft.data.encode.part import frame_patches
from qwenvl_ft.data.share import Share
from qwenvl_ft.errors import DataError

if TYPE_CHECKING:
    from qwenvl_ft.data.plan.dataset import SampleDataset, Ticket

SAME = ("input_ids", "labels", "label_weights", "position_ids", "image_grid_thw", "video_grid_thw")
"""Keys of a sample that must be the same on all ranks of a group."""


def shared_row(
    dataset: SampleDataset, tickets: Sequence[Ticket], share: Share, left_out: Mapping[int, str] | None = None
) -> list[Sample]:
    """Make the samples of a row, with the pixels of this rank's own frames.

    Args:
        left_out: index into ``tickets`` -> why that sample is replaced by tokens without meaning, on every rank.

    Returns:
        Samples with all tokens, labels, positions and grids, and ``pixel_values`` of own frames only; a sample without
        own frames has none. ``image_owners`` and ``video_owners`` tell the owner of each frame. A record that cannot
        be read has a ``fault``; it still has its planned number of tokens.

    Raises:
        DataError: a record cannot be read, and ``dataset.on_error`` is ``raise``.
    """
    reasons = left_out or {}
    drafts = [reasons.get(k) or _draft(dataset, ticket) for k, ticket in enumerate(tickets)]
    patches = [[] if isinstance(draft, str) else frame_patches(draft) for draft in drafts]
    owners = np.split(
        share.deal(list(chain.from_iterable(patches))), np.cumsum([len(frames) for frames in patches])[:-1]
    )
    row: list[Sample] = []
    for ticket, draft, places in zip(tickets, drafts, owners, strict=True):
        sample = _sample(dataset, ticket, draft, places == share.place)
        images = 0 if isinstance(draft, str) else len(draft.images)
        owned = {"image_owners": places[:images], "video_owners": places[images:]}
        more: Any = {key: torch.from_numpy(value) for key, value in owned.items() if value.size}
        sample.update(more | {"ticket": ticket, "digest": _digest(sample)})
        row.append(sample)
    return row


def _draft(dataset: SampleDataset, ticket: Ticket) -> Draft | str:
    """Return a sample's draft, or why it cannot be read."""
    try:
        return dataset.draft(ticket)
    except DataError as error:
        if dataset.on_error == "raise":
            raise
        return str(error)


def _sample(dataset: SampleDataset, ticket: Ticket, draft: Draft | str, owned: NDArray[np.bool_]) -> Sample:
    """Make a sample with the pixels of owned frames; blank ones if one of them cannot be decoded."""
    if isinstance(draft, str):
        return dataset.placeholder(draft, ticket.tokens)
    try:
        return dataset.sample_of(ticket, draft, owned)
    except DataError as error:
        if dataset.on_error == "raise":
            raise
        sample = dataset.sample_of(ticket, draft, owned, blank=True)
        sample["fault"] = str(error)
        return sample


def _digest(sample: Sample) -> int:
    """Return a hash of all that the ranks of a group must have in common, as a signed 64-bit number."""
    digest = xxhash.xxh64()
    for key in SAME:
        if key in sample:
            digest.update(key.encode())
            digest.update(sample[key].contiguous().numpy().tobytes())  # type: ignore[literal-required]
    return int.from_bytes(digest.digest(), "big", signed=True)
