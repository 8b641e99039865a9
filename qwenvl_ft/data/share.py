"""One rank's share of a row that several ranks train together (sequence parallelism).

Tokens, labels and positions are those of the whole row on every rank. Pixels are those of the rank's own frames.

Letters: F frames of the row (images, or pairs of frames of videos), P patches of own frames, V media tokens of the row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenvl_ft.data.conversation import IGNORE, Sample, Source
from qwenvl_ft.data.plan.costs import CostModel


@dataclass(frozen=True)
class Share:
    """The place of a rank in the group that trains a row, and what follows from it."""

    size: int
    """Ranks of the group."""
    place: int
    """Place of this rank in it, from 0."""
    pad_id: int
    """Id of the padding token."""
    costs: CostModel
    """Must be the same on all ranks of the group."""

    def deal(self, patches: Sequence[int]) -> NDArray[np.int64]:
        """Deal frames out to the ranks of the group: the most expensive first, each to the rank with the least so far.

        Args:
            patches: number of patches of each frame.

        Returns:
            int64[F], the place of the rank that runs each frame; the same on every rank of the group.
        """
        costs = self.costs.of(np.zeros(len(patches)), patches)
        owners = np.zeros(len(patches), dtype=np.int64)
        loads = [(0.0, 0, place) for place in range(self.size)]  # (cost, frames, place), a heap
        for frame in np.argsort(-costs, kind="stable"):
            cost, frames, place = loads[0]
            owners[frame] = place
            heapq.heapreplace(loads, (cost + float(costs[frame]), frames + 1, place))
        return owners

    def padded(self, row: Sequence[Sample]) -> list[Sample]:
        """Append a sample of padding, so that ``size`` divides the row's tokens. It is unsupervised and isolated."""
        missing = -sum(len(sample["input_ids"]) for sample in row) % self.size
        return [*row, padding(missing, self.pad_id)] if missing else list(row)

    def own_media(self, row: Sequence[Sample], fillers: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the media of this rank, and whose the row's other frames are.

        Args:
            row: samples from `shared_row`, and fillers, whose frame belongs to the rank at place 0.
            fillers: for every medium; a rank without frames runs its filler's, which belongs to no token.

        Returns:
            For images, and the same for videos: ``pixel_values`` [P, C] and ``image_grid_thw`` int64[own frames, 3],
            one line (1, height, width) for each own frame, in the row's order, or those of the filler;
            ``image_owners`` int64[F], the place of each frame's rank; ``image_tokens`` int64[F], tokens of each frame,
            which add up to V. No key of a medium that the row lacks.
        """
        return _own(row, fillers, self.place, "image", "pixel_values") | _own(
            row, fillers, self.place, "video", "pixel_values_videos"
        )


def _own(row: Sequence[Any], fillers: Sequence[Any], place: int, kind: str, pixels: str) -> dict[str, Tensor]:
    grid = f"{kind}_grid_thw"
    members = [sample for sample in row if grid in sample]
    if not members:
        return {}
    (filler,) = [filler for filler in fillers if grid in filler]
    frames = [_frames(sample[grid]) for sample in members]
    first = torch.zeros(1, dtype=torch.int64)
    owners = torch.cat([sample.get(f"{kind}_owners", first) for sample in members])
    every = torch.cat(frames)
    mine = owners == place
    idle = not mine.any()
    own = [filler] if idle else [sample for sample in members if pixels in sample]
    return {
        pixels: torch.cat([sample[pixels] for sample in own]),
        grid: filler[grid] if idle else every[mine],
        f"{kind}_owners": owners,
        f"{kind}_tokens": every.prod(dim=1) // filler[grid].prod(),  # a filler has one token
    }


def _frames(grids: Tensor) -> Tensor:
    """Return int64[F, 3]: the grid of each frame of media with the given grids int64[N, 3]."""
    frames = grids.repeat_interleave(grids[:, 0], dim=0)
    frames[:, 0] = 1
    return frames


def padding(tokens: int, pad_id: int) -> Sample:
    """Return an unsupervised sample of padding tokens."""
    ids = torch.full((tokens,), pad_id)
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE),
        "position_ids": torch.arange(tokens).repeat(3, 1),
        "source": Source("padding", "padding"),
    }


@dataclass(frozen=True)
class RowCheck:
    """What the ranks of a group compare before they train a row."""

    tickets: tuple[Any, ...]
    """Of each sample, to make the row again."""
    digests: tuple[int, ...]
    """Hash of each sample's tokens, labels, positions and grids."""
    faults: dict[int, str]
    """Index of a sample -> why this rank could not read it."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> RowCheck:
        return cls(
            tuple(sample["ticket"] for sample in samples),
            tuple(sample["digest"] for sample in samples),
            {k: sample["fault"] for k, sample in enumerate(samples) if "fault" in sample},
        )
