"""How many patches a medium becomes, from its header alone, by the processors' own resize rules."""

from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize

from qwenvl_ft.data.conversation import Image, Source, Video
from qwenvl_ft.data.media import MediaPolicy, image_size
from qwenvl_ft.errors import DataError

Grid = tuple[int, int, int]
"""Patches along time, height, width."""

DEFAULT_FPS = 2.0
"""Frames a second of a list of frames that does not say; the rate at which the released models sample videos."""


def image_grid(image: Image, processor: Any, policy: MediaPolicy, source: Source) -> Grid:
    """Raises DataError: the image cannot be opened, or is too long and thin."""
    try:
        height, width = image_size(image.value, policy)
        if processor.do_resize:
            height, width = image_resize(
                height,
                width,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
    except ValueError as error:  # DataError of the media, or the resize rule's own limit on the aspect ratio
        raise DataError(f"{source}: {error}") from None
    return 1, height // processor.patch_size, width // processor.patch_size


def video_grid(video: Video, processor: Any, policy: MediaPolicy, source: Source) -> Grid:
    """Raises DataError: a frame cannot be opened, frames differ in size, or the processor knows no videos."""
    if not hasattr(processor, "max_video_tokens"):
        raise DataError(f"{source}: videos need a Qwen3-VL processor, not {type(processor).__name__}.")
    if isinstance(video.value, str):
        raise DataError(f"{source}: {video.value} is a video file. Give the video as a list of its frames.")
    frames = len(video.value)
    try:
        sizes = {image_size(frame, policy) for frame in video.value}
        if len(sizes) != 1:
            raise DataError(f"the frames of a video have several sizes (height, width): {sorted(sizes)[:3]}.")
        height, width = sizes.pop()
        factor = processor.patch_size * processor.merge_size
        longest = processor.size["longest_edge"]
        if processor.cap_pixels_per_frame:
            cap = min(processor.max_video_tokens * factor * factor, longest // frames)
            longest = max(cap, int(processor.size["shortest_edge"] * 1.05)) * frames
        height, width = video_resize(
            frames,
            height,
            width,
            temporal_factor=processor.temporal_patch_size,
            factor=factor,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=longest,
        )
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None
    pairs = -(-frames // processor.temporal_patch_size)
    return pairs, height // processor.patch_size, width // processor.patch_size


def frame_times(video: Video, step: int) -> list[float]:
    """Seconds of each frame pair, the mean of its two frames; an odd last frame is doubled."""
    count = len(video.value)
    frames = np.minimum(np.arange(count + -count % step), count - 1) / (video.fps or DEFAULT_FPS)
    return [float(frames[k] + frames[k + step - 1]) / 2 for k in range(0, frames.size, step)]


def checked_grids(actual: torch.Tensor, planned: list[Grid], source: Source) -> torch.Tensor:
    """The processor's grids, if they are the planned ones.

    Raises:
        DataError: an image changed its size between planning and now, or its header lies.
    """
    grids = actual.to(torch.int64)
    if grids.tolist() != [list(grid) for grid in planned]:
        raise DataError(
            f"{source}: the media's headers promise grids {planned}, but their pixels give {grids.tolist()} "
            "(patches along time, height, width). Was a file changed?"
        )
    return grids
