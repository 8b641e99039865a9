"""Reads the images and videos of a draft and turns them into patches, within a time limit.

Letters in shapes: P patches, N images or videos, C values of a patch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from qwenvl_ft.data.conversation import Conversation, Image, Limits, Sample, Source
from qwenvl_ft.data.encode.draft import Draft
from qwenvl_ft.data.media.deadline import within
from qwenvl_ft.data.media.grids import Grid, image_grid, require_grids
from qwenvl_ft.data.media.images import MediaPolicy, medium_name, open_image
from qwenvl_ft.data.media.patches import raw_patches, resized
from qwenvl_ft.data.media.refused import SKIP
from qwenvl_ft.data.media.video import clip_pixels
from qwenvl_ft.errors import DataError
from qwenvl_ft.upstream.processors import video_patches


def image_grids_in_time(conversation: Conversation, processor: Any, policy: MediaPolicy) -> list[Grid]:
    """Return the grids of a conversation's images, from their headers.

    Args:
        processor: an image processor.

    Raises:
        DataError: an image cannot be read, or the disk does not answer within ``policy.image_timeout``.
    """
    images, source = conversation.media(Image), conversation.source
    if not images:
        return []
    grids = (image_grid(image, processor, policy, source) for image in images)
    return list(within(lambda: grids, policy.image_timeout, _timeout_error(images, policy, source)))


def media_pixels(draft: Draft, processor: Any, policy: MediaPolicy, *, raw: bool, blank: bool = False) -> Sample:
    """Return ``pixel_values`` and ``pixel_values_videos`` of a draft; a key is absent if there is no such medium.

    Args:
        processor: of the model, for images and videos.
        raw: as for `image_pixels`.
        blank: read no medium, and return zeros of the same shape.

    Raises:
        DataError: as `image_pixels` and `video_pixels`.
    """
    images, videos = processor.image_processor, processor.video_processor
    made = Sample()
    if draft.images:
        made["pixel_values"] = (
            blank_pixels(draft.image_grids, images, raw) if blank else image_pixels(draft, images, policy, raw=raw)
        )
    if draft.videos:
        made["pixel_values_videos"] = (
            blank_pixels(draft.video_grids, videos) if blank else video_pixels(draft, videos, policy)
        )
    return made


def image_pixels(draft: Draft, processor: Any, policy: MediaPolicy, *, raw: bool) -> torch.Tensor:
    """Open a draft's images and cut them into patches.

    Args:
        processor: an image processor.
        raw: return raw patches (data/media/patches.py) instead of the processor's.

    Returns:
        float32[P, C], or raw, uint8[P, C / 2].

    Raises:
        DataError: an image cannot be read, was changed since its header was read, or takes too long.
    """
    late = _timeout_error(draft.images, policy, draft.source)
    opened = list(within(lambda: _opened(draft, processor, policy, raw), policy.image_timeout, late))
    images, grids = [image for image, _ in opened], [grid for _, grid in opened]
    require_grids(torch.tensor(grids), draft.image_grids, draft.source)
    if raw:
        return images[0] if len(images) == 1 else torch.cat(images)
    side = processor.patch_size
    if all(image.limits == Limits() for image in draft.images):
        patches = processor(images=images, return_tensors="pt")
    else:  # the processor has one size rule for all images, so each is resized first
        sized = [
            resized(torch.from_numpy(np.array(image)).permute(2, 0, 1), high * side, wide * side, processor)
            for image, (_, high, wide) in zip(images, grids, strict=True)
        ]
        patches = processor(images=sized, do_resize=False, return_tensors="pt")
    require_grids(patches["image_grid_thw"], grids, draft.source)
    return cast(torch.Tensor, patches["pixel_values"])


def _opened(draft: Draft, processor: Any, policy: MediaPolicy, raw: bool) -> Iterator[tuple[Any, Grid]]:
    """Yield each image with its current grid: its raw patches, or the image itself for the processor."""
    for image in draft.images:
        try:
            pixels = open_image(image.value, policy)
        except DataError as error:
            raise DataError(f"{draft.source}: {error}") from None
        grid = image_grid(replace(image, value=pixels), processor, policy, draft.source)
        yield raw_patches(pixels, grid, processor) if raw else pixels, grid


def _timeout_error(images: Sequence[Image], policy: MediaPolicy, source: Source) -> Callable[[int], DataError]:
    """Return a function from the number of images that were read in time to the error for the next one."""

    def error(num_read: int) -> DataError:
        return DataError(
            f"{source}: image {medium_name(images[num_read].value)} cannot be read within data.image_timeout="
            f"{policy.image_timeout:g} s. Is its disk or network slow? Raise the limit, {SKIP}."
        )

    return error


def video_pixels(draft: Draft, processor: Any, policy: MediaPolicy) -> torch.Tensor:
    """Decode the frames that a draft's videos show and cut them into patches.

    Args:
        processor: a video processor.

    Returns:
        float32[P, C]

    Raises:
        DataError: a video cannot be decoded, or was changed since its header was read.
    """
    clips = [
        clip_pixels(video, clip, processor, policy, draft.source)
        for video, clip in zip(draft.videos, draft.clips, strict=True)
    ]
    patches = video_patches(processor, clips, [clip.rate for clip in draft.clips])
    require_grids(patches["video_grid_thw"], draft.video_grids, draft.source)
    return cast(torch.Tensor, patches["pixel_values_videos"])


def blank_pixels(grids: Sequence[Grid], processor: Any, raw: bool = False) -> torch.Tensor:
    """Return zeros in the shape of the patches of images or videos, in place of media that cannot be decoded.

    Args:
        processor: an image processor or a video processor.
    """
    width = 3 * processor.patch_size**2 * (1 if raw else processor.temporal_patch_size)
    patches = sum(t * h * w for t, h, w in grids)
    return torch.zeros(patches, width, dtype=torch.uint8 if raw else torch.float32)
