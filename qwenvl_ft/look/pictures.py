"""Rebuilds the pictures that the model sees from a sample's patches, un-normalised.

Letters: P patches, C channels, T temporal patch size, p patch side, m merge size.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

LOSSLESS_BYTES = 400_000
"""A picture whose PNG is larger, in bytes, is stored as JPEG."""
QUALITY = 90


def pictures(patches: Tensor, grids: Tensor, processor: Any) -> list[list[PILImage.Image]]:
    """Return the frames of each medium of a sample; an image has one.

    Args:
        patches: float32[P, C * T * p * p] as the processor gives them, or uint8[P, C * p * p] (data/media/patches.py).
        grids: int64[N, 3], patches along time, height, width.
        processor: the image or the video processor.
    """
    sizes = [int(grid.prod()) for grid in grids]
    return [frames(part, grid.tolist(), processor) for part, grid in zip(patches.split(sizes), grids, strict=True)]


def frames(patches: Tensor, grid: Sequence[int], processor: Any) -> list[PILImage.Image]:
    """Return the frames of one medium in order; one for an image, whose patches hold it twice."""
    pairs, high, wide = grid
    side, merge = processor.patch_size, processor.merge_size
    times = patches.shape[1] // (3 * side * side)
    blocks = patches.reshape(pairs, high // merge, wide // merge, merge, merge, 3, times, side, side)
    #        pair, block row, block column, row and column in it, channel, time, pixel row, pixel column
    pixels = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(pairs * times, 3, high * side, wide * side)
    if patches.dtype != torch.uint8:
        pixels = denormalised(pixels, processor)
    images = [PILImage.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]
    still = pairs == 1 and all(frame.tobytes() == images[0].tobytes() for frame in images)
    return images[:1] if still else images


def denormalised(pixels: Tensor, processor: Any) -> Tensor:
    """Undo the processor's scaling and normalisation: float32[F, C, H, W] -> uint8[F, C, H, W]."""
    if processor.do_normalize:
        mean, std = (torch.tensor(value)[None, :, None, None] for value in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8)


def data_uri(image: PILImage.Image) -> str:
    """Encode a picture as a data URI."""
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": QUALITY})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if kind == "JPEG" or file.tell() <= LOSSLESS_BYTES:
            break
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
