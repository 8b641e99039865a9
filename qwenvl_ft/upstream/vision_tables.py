"""Computes the position tables of frames in dataloader workers, for the vision tower, which would compute them itself.

Relies on ``position_ids``, ``interp_indices``, ``interp_weights``, ``cu_seqlens`` and ``max_seqlen`` as keyword
arguments of ``visual``, and on the functions of ``transformers.vision_utils`` that compute them, transformers 5.15 to
5.24. Before, or if these functions differ, batches have no tables and the vision tower computes them (`POSITIONS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.upstream.probe import Feature, first, lacks, takes

TABLES = ("position_ids", "interp_indices", "interp_weights", "cu_seqlens", "max_seqlen")
"""Arguments that the vision tower accepts instead of computing them; a batch has each with ``image_`` or ``video_``."""
KNOWN = "bilinear", True
"""Interpolation mode and ``align_corners`` of learned positions for which the tables are computed."""


def vision_tables(visual: Any) -> Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None:
    """Return a function that computes the tables of a frame; None if the vision tower must compute them itself.

    The function maps (height, width) in patches to ``position_ids`` int64[P, 2], ``interp_indices`` int64[P, 4] and
    ``interp_weights`` float32[P, 4].
    """
    interpolation = getattr(visual, "interpolation_mode", ""), getattr(visual, "interpolation_align_corners", None)
    return frame_tables(visual.spatial_merge_size, visual.num_grid_per_side) if interpolation == KNOWN else None


def frame_tables(merge: int, side: int) -> Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None:
    """Return `vision_tables` for a tower that merges ``merge * merge`` patches and has ``side * side`` positions."""
    return None if no_tables() else _Tables(merge, side)


@dataclass(frozen=True)
class _Tables:
    """A picklable function, because spawned dataloader workers receive it."""

    merge: int
    side: int

    def __call__(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        return _frame(height, width, self.merge, self.side)


@lru_cache(maxsize=256)
def _frame(height: int, width: int, merge: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import vision_utils

    grid = torch.tensor([[1, height, width]])
    positions = vision_utils.get_vision_position_ids(grid, merge)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    return positions, indices, weights


@cache
def no_tables() -> str:
    """Return the reason why there are no tables; empty if there are."""
    module = "transformers.vision_utils"
    names = "get_vision_position_ids", "get_vision_interpolation_indices_and_weights", "get_vision_attention_seqlens"
    if missing := lacks(module, names):
        return missing
    from transformers import vision_utils

    needed = "grid_thw", "num_grid_per_side", "mode", "align_corners", "spatial_merge_size", "kwargs"
    return first(
        takes(vision_utils.get_vision_interpolation_indices_and_weights, *needed),
        takes(vision_utils.get_vision_position_ids, "grid_thw", "spatial_merge_size", "kwargs"),
    )


POSITIONS = Feature(
    name="patch positions computed by dataloader workers",
    missing=no_tables,
    instead="the vision tower computes them itself and waits for the device a few times a step",
)
FEATURES = (POSITIONS,)
