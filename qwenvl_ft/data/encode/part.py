"""Which of a draft's frames does one rank make the pixels of? For rows that several ranks train together.

A frame is what the vision tower attends within: an image, or a pair of a video's frames. The frames of a draft are its
images in order, then those of each video. Letters in shapes: F frames.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.encode.draft import Draft
from qwenvl_ft.data.media.video import Clip


def frame_patches(draft: Draft) -> list[int]:
    """Return the number of patches of each of F frames."""
    return [h * w for t, h, w in draft.image_grids + draft.video_grids for _ in range(t)]


def part_of(draft: Draft, owned: NDArray[np.bool_], step: int) -> Draft:
    """Return the draft with only the media and video frames that are owned; its tokens are unchanged.

    Args:
        owned: bool[F]
        step: frames of a video that share a time (``temporal_patch_size``).
    """
    images = np.flatnonzero(owned[: len(draft.images)])
    videos, clips = [], []
    first = len(draft.images)
    for video, clip in zip(draft.videos, draft.clips, strict=True):
        pairs = np.flatnonzero(owned[first : first + clip.grid[0]])
        first += clip.grid[0]
        if pairs.size:
            videos.append(video)
            clips.append(_part_of_clip(clip, pairs, step))
    return replace(
        draft,
        images=[draft.images[k] for k in images],
        image_grids=[draft.image_grids[k] for k in images],
        videos=videos,
        clips=clips,
    )


def _part_of_clip(clip: Clip, pairs: NDArray[np.int64], step: int) -> Clip:
    """Return a clip of some frame pairs; a last pair that lacks a frame lacks it in its part too."""
    indices = [index for pair in pairs for index in clip.indices[pair * step : (pair + 1) * step]]
    return replace(clip, indices=tuple(indices), grid=(len(pairs), *clip.grid[1:]))
