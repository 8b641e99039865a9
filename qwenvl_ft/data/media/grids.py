"""The patch grid of an image, from its header alone, by the processor's resize rule."""

from collections.abc import Mapping
from typing import Protocol

import torch

from qwenvl_ft.data.conversation import Image, Limits, Source
from qwenvl_ft.data.media.images import MediaPolicy, image_header, medium_name
from qwenvl_ft.data.media.refused import TooThin, too_thin
from qwenvl_ft.errors import DataError
from qwenvl_ft.upstream import processors

Grid = tuple[int, int, int]
"""Number of patches along time, height, width."""

EXACT_TOKENS = (4, 16384)
"""Minimum and maximum tokens of a medium with an explicit ``resized_height``, as in qwen-vl-utils."""


class MediaProcessor(Protocol):
    """The settings that image and video processors of transformers share."""

    patch_size: int
    merge_size: int
    do_resize: bool
    size: Mapping[str, int]
    """``shortest_edge`` and ``longest_edge``: smallest and largest area in pixels."""


def image_grid(image: Image, processor: MediaProcessor, policy: MediaPolicy, source: Source) -> Grid:
    """Return the patch grid of an image after resizing.

    Raises:
        DataError: the image cannot be opened.
        TooThin: the processor refuses its aspect ratio.
    """
    return grid_and_frames(image, processor, policy, source, count_frames=False)[0]


def grid_and_frames(
    image: Image, processor: MediaProcessor, policy: MediaPolicy, source: Source, *, count_frames: bool = True
) -> tuple[Grid, int]:
    """Return the patch grid of an image, and its number of frames if it has several of which none was chosen, else 0.

    Raises:
        DataError, TooThin: as `image_grid`.
    """
    try:
        header = image_header(image.value, policy, count_frames=count_frames)
        return grid_of_size(image, header.height, header.width, processor), header.frames
    except DataError as error:
        raise type(error)(f"{source}: {error}") from None


def grid_of_size(image: Image, height: int, width: int, processor: MediaProcessor) -> Grid:
    """Return the patch grid of an image whose size is known.

    Raises:
        TooThin: the processor refuses its aspect ratio.
    """
    if processor.do_resize:
        try:
            height, width = _size(height, width, image.limits, processor)
        except TooThin:
            raise
        except ValueError:  # the rule's limit on the aspect ratio
            raise too_thin(f"image {medium_name(image.value)}", width, height) from None
    return 1, height // processor.patch_size, width // processor.patch_size


def exact_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Round an explicit size to whole merged patches of ``factor`` pixels.

    Raises:
        TooThin: the processor refuses its aspect ratio.
    """
    smallest, largest = (tokens * factor * factor for tokens in EXACT_TOKENS)
    try:
        return processors.image_size(height, width, factor=factor, min_pixels=smallest, max_pixels=largest)
    except ValueError:
        what, remedy = "a medium with resized_width and resized_height", "Correct these two keys"
        raise too_thin(what, width, height, remedy) from None


def _size(height: int, width: int, limits: Limits, processor: MediaProcessor) -> tuple[int, int]:
    factor = processor.patch_size * processor.merge_size
    if limits.resized_height is not None and limits.resized_width is not None:
        return exact_size(limits.resized_height, limits.resized_width, factor)
    smallest, largest = processor.size["shortest_edge"], processor.size["longest_edge"]
    if limits.max_pixels is not None:
        smallest, largest = min(smallest, limits.max_pixels), limits.max_pixels
    if limits.min_pixels is not None:
        smallest, largest = limits.min_pixels, max(largest, limits.min_pixels)
    return processors.image_size(height, width, factor=factor, min_pixels=smallest, max_pixels=largest)


def require_grids(actual: torch.Tensor, planned: list[Grid], source: Source) -> None:
    """Raise unless a processor's grids int[N, 3] are the planned ones.

    Raises:
        DataError: they differ, because a file changed after planning or its header is wrong.
    """
    if actual.tolist() != [list(grid) for grid in planned]:
        raise DataError(
            f"{source}: the headers of the media give the grids {planned}, but their pixels give {actual.tolist()} "
            "(patches along time, height, width). Was a file changed?"
        )
