"""Defines the draft: a conversation as tokens, with one placeholder for each image or pair of video frames.

A draft needs text and media headers only; no pixel is decoded. It already has the length of its sample, so truncation
happens at this stage. `Extent` is its size. Letters in shapes: D draft tokens.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Image, Source, Video
from qwenvl_ft.data.media.video import Clip
from qwenvl_ft.errors import DataError

TURN, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
ENCLOSED_VIDEO = VISION_START + VIDEO_PAD + VISION_END
CONTROL = (TURN, TURN_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
"""Control tokens, which only the chat template may write. In a record's text they would open a turn or a medium."""

STRATEGIES = ("raise", "delete", "left", "right")
"""Values of ``template.truncation_strategy``."""


class TooLong(DataError):
    """A sample exceeds ``max_length`` and the truncation strategy does not cut samples."""


class Unsupervised(DataError):
    """No token of the sample is supervised, so the model would learn nothing from it."""


@dataclass(frozen=True)
class Draft:
    """A conversation as tokens, with one placeholder for each image or pair of video frames."""

    ids: NDArray[np.int64]
    """[D]"""
    supervised: NDArray[np.bool_]
    """[D], see labels.py."""
    counts: NDArray[np.int64]
    """[D] number of tokens that each draft token expands to; 1 for text."""
    widths: NDArray[np.int64]
    """[D] number of tokens in one line of the placeholder's grid; 0 for text."""
    group: NDArray[np.int64]
    """[D] index of the medium that the token belongs to; -1 for text. Images come first, then videos.

    The tokens around a placeholder (``<|vision_start|>``, ``<|vision_end|>``, a frame's time) belong to its medium.
    """
    images: list[Image]
    image_grids: list[tuple[int, int, int]]
    """Patches along time, height, width."""
    videos: list[Video]
    clips: list[Clip]
    """The frames that each video shows."""
    source: Source
    weights: NDArray[np.float64] | None = None
    """[D] weight of each token in the training loss; None if all are 1."""
    cut_tokens: int = 0
    """Tokens that `cut` removed."""
    cut_media: int = 0
    """Images and videos that `cut` removed."""

    @property
    def length(self) -> int:
        """Tokens of the sample."""
        return int(self.counts.sum())

    @property
    def video_grids(self) -> list[tuple[int, int, int]]:
        """Patches along time, height, width."""
        return [clip.grid for clip in self.clips]

    @property
    def patches(self) -> int:
        """Vision patches of the sample."""
        return sum(t * h * w for t, h, w in self.image_grids + self.video_grids)


class Extent(NamedTuple):
    """The size of a sample, as planning needs it."""

    tokens: int
    patches: int
    has_video: bool
    cut_tokens: int
    """Tokens that truncation removed."""
    cut_media: int
    """Images and videos that truncation removed."""
    several_frames: tuple[str, ...]
    """Images of several frames or pages of which none was chosen, each as ``PATH (5 frames)``."""


def cut(draft: Draft, max_length: int | None, strategy: str) -> Draft:
    """Truncate a draft to at most ``max_length`` tokens. A medium that the cut would split is removed whole.

    Raises:
        TooLong: the strategy is neither ``left`` nor ``right``.
    """
    if max_length is None or draft.length <= max_length:
        return draft
    if strategy not in ("left", "right"):
        raise too_long(draft, max_length)
    ends = np.cumsum(draft.counts)
    if strategy == "right":
        stop = int(np.searchsorted(ends, max_length, side="right"))
        while stop > 0 and _inside_medium(draft.group, stop):
            stop -= 1
        keep = slice(0, stop)
    else:
        start = int(np.searchsorted(ends, draft.length - max_length, side="left")) + 1
        while start < draft.ids.size and _inside_medium(draft.group, start):
            start += 1
        keep = slice(start, draft.ids.size)
    kept = _slice(draft, keep)
    media = len(draft.images) + len(draft.videos) - len(kept.images) - len(kept.videos)
    return replace(kept, cut_tokens=draft.length - kept.length, cut_media=media)


def too_long(draft: Draft, max_length: int) -> TooLong:
    """Build the error for a sample that exceeds ``max_length``."""
    media = f", {draft.patches} patches of media" if draft.patches else ""
    return TooLong(
        f"{draft.source}: {draft.length} tokens{media}, but template.max_length is {max_length}. Raise it, "
        "lower template.max_pixels, or set template.truncation_strategy to delete, left or right."
    )


def _inside_medium(group: NDArray[np.int64], index: int) -> bool:
    """Return True if a cut before token ``index`` would split a medium."""
    return bool(group[index] >= 0 and group[index - 1] == group[index])


def _slice(draft: Draft, keep: slice) -> Draft:
    """Return the draft of the kept tokens, with the media that still belong to one of them."""
    group = draft.group[keep]
    images, videos = range(len(draft.images)), range(len(draft.videos))
    kept = set(group[group >= 0].tolist())
    kept_images = [k for k in images if k in kept]
    kept_videos = [k for k in videos if k + len(draft.images) in kept]
    return Draft(
        draft.ids[keep],
        draft.supervised[keep],
        draft.counts[keep],
        draft.widths[keep],
        group,
        [draft.images[k] for k in kept_images],
        [draft.image_grids[k] for k in kept_images],
        [draft.videos[k] for k in kept_videos],
        [draft.clips[k] for k in kept_videos],
        draft.source,
        None if draft.weights is None else draft.weights[keep],
    )
