"""Images as the bytes they are: resized as the processor resizes, neither normalised nor repeated in time.

A patch of the processor is float32 and holds the same picture ``temporal_patch_size`` times: eight times these bytes.
What is left out here, `qwenvl_ft.model.patch_embed` does on the device.

Letters: P patches, C channels, p patch side, T temporal patch size.
"""

from typing import Any

import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from qwenvl_ft.upstream.processors import interpolation, is_torchvision

STANDARD = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
"""Settings of an image processor of which raw patches are the first half."""

CHANNELS = 3


def obstacle(image_processor: Any) -> str:
    """Why an image processor's patches cannot be made from raw ones; empty if they can."""
    if not is_torchvision(image_processor):
        return f"the image processor is {type(image_processor).__name__}, not of torchvision"
    for name, value in STANDARD.items():
        found = getattr(image_processor, name, None)
        if found != value:
            return f"the image processor has {name}={found}, not {value}"
    return ""


def raw_patches(image: PILImage.Image, grid: tuple[int, int, int], image_processor: Any) -> Tensor:
    """uint8[P, C * p * p] of an RGB image, in the processor's order of patches and of values within each.

    Args:
        grid: (1, height, width) in patches, of the resized image.

    Source: ``Qwen2VLImageProcessor`` of transformers; the same resize on the same bytes.
    """
    side, merge = image_processor.patch_size, image_processor.merge_size
    _, high, wide = grid
    pixels = resized(stored(image).permute(2, 0, 1), high * side, wide * side, image_processor)  # [4, H, W]
    whole = pixels.permute(1, 2, 0).contiguous().view(torch.int32)
    blocks = whole.view(high // merge, merge, side, wide // merge, merge, side).permute(0, 3, 1, 4, 2, 5)
    blocks = blocks.reshape(high * wide, side * side)  # a pixel moves as one number: half the time of four
    patches = torch.empty(high * wide, CHANNELS, side * side, dtype=torch.uint8)
    for channel in range(CHANNELS):
        patches[:, channel] = (blocks >> 8 * channel).to(torch.uint8)
    return patches.view(high * wide, CHANNELS * side * side)


def stored(image: PILImage.Image) -> Tensor:
    """uint8[H, W, 4] of an RGB image: the bytes that PIL holds, with its fourth that means nothing.

    An image of more than 16 MB is held in several blocks and is copied; any other is shared.
    """
    try:
        told: Any = pa.array(image)
        pixels = torch.from_dlpack(told.values)
    except (ValueError, TypeError):  # several blocks, or a Pillow that does not share its bytes
        pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 4)


def resized(pixels: Tensor, height: int, width: int, processor: Any) -> Tensor:
    """uint8[..., height, width] of uint8[..., H, W], as the torchvision processors of transformers resize."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return tvF.resize(pixels, [height, width], interpolation=interpolation(processor), antialias=True)
