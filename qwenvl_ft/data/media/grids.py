"""How many patches an image becomes, from its header alone, by the processor's own resize rule."""

from typing import Any

import torch

from qwenvl_ft.data.conversation import Image, Limits, Source
from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.errors import DataError
from qwenvl_ft.upstream import processors

Grid = tuple[int, int, int]
"""Patches along time, height, width."""

EXACT_TOKENS = (4, 16384)
"""Fewest and most tokens of a medium whose size its record states, as in qwen-vl-utils."""


def image_grid(image: Image, processor: Any, policy: MediaPolicy, source: Source) -> Grid:
    """Raises DataError: the image cannot be opened, or is too long and thin."""
    try:
        height, width = image_size(image.value, policy)
        if processor.do_resize:
            height, width = _size(height, width, image.limits, processor)
    except ValueError as error:  # DataError of the media, or the resize rule's own limit on the aspect ratio
        raise DataError(f"{source}: {error}") from None
    return 1, height // processor.patch_size, width // processor.patch_size


def exact_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """A stated size in whole merged patches of ``factor`` pixels."""
    least, most = (tokens * factor * factor for tokens in EXACT_TOKENS)
    return processors.image_size(height, width, factor=factor, min_pixels=least, max_pixels=most)


def _size(height: int, width: int, limits: Limits, processor: Any) -> tuple[int, int]:
    factor = processor.patch_size * processor.merge_size
    if limits.resized_height is not None and limits.resized_width is not None:
        return exact_size(limits.resized_height, limits.resized_width, factor)
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if limits.max_pixels is not None:
        least, most = min(least, limits.max_pixels), limits.max_pixels
    if limits.min_pixels is not None:
        least, most = limits.min_pixels, max(most, limits.min_pixels)
    return processors.image_size(height, width, factor=factor, min_pixels=least, max_pixels=most)


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
