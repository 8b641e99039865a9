"""Raw patches: images as uint8, resized like the processor does, but neither normalised nor repeated in time.

The processor's patches are float32 and repeat each picture ``temporal_patch_size`` times: eight times as many bytes.
`qwenvl_ft.model.patch_embed` does the remaining steps on the device.

Letters: P patches, C channels, p patch side.
"""

from typing import Any

import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from qwenvl_ft.data.media.grids import MediaProcessor
from qwenvl_ft.upstream.processors import interpolation, is_torchvision

STANDARD = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
"""Settings of an image processor that raw patches support."""

CHANNELS = 3


def obstacle(image_processor: object) -> str:
    """Return the reason why raw patches cannot replace an image processor's patches; empty if they can."""
    if not is_torchvision(image_processor):
        return f"the image processor is {type(image_processor).__name__}, not of torchvision"
    for name, value in STANDARD.items():
        found = getattr(image_processor, name, None)
        if found != value:
            return f"the image processor has {name}={found}, not {value}"
    return ""


def raw_patches(image: PILImage.Image, grid: tuple[int, int, int], image_processor: MediaProcessor) -> Tensor:
    """Return the patches uint8[P, C * p * p] of an RGB image, ordered as the processor orders patches and values.

    Args:
        grid: (1, height, width) in patches, of the resized image.

    Source: ``Qwen2VLImageProcessor`` of transformers.
    """
    side, merge = image_processor.patch_size, image_processor.merge_size
    _, high, wide = grid
    pixels = resized(stored(image).permute(2, 0, 1), high * side, wide * side, image_processor)  # [4, H, W]
    packed = pixels.permute(1, 2, 0).contiguous().view(torch.int32)
    blocks = packed.view(high // merge, merge, side, wide // merge, merge, side).permute(0, 3, 1, 4, 2, 5)
    blocks = blocks.reshape(high * wide, side * side)  # moving a pixel as one int32 takes half the time of four bytes
    patches = torch.empty(high * wide, CHANNELS, side * side, dtype=torch.uint8)
    for channel in range(CHANNELS):
        patches[:, channel] = (blocks >> 8 * channel).to(torch.uint8)
    return patches.view(high * wide, CHANNELS * side * side)


def stored(image: PILImage.Image) -> Tensor:
    """Return uint8[H, W, 4] of an RGB image: PIL's buffer, whose fourth byte per pixel is unused.

    PIL stores an image of more than 16 MB in several blocks, which are copied; any other image shares its memory.
    """
    try:
        array: Any = pa.array(image)
        pixels = torch.from_dlpack(array.values)
    except (ValueError, TypeError):  # several blocks, or a Pillow without the Arrow interface
        pixels = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 4)


def resized(pixels: Tensor, height: int, width: int, processor: MediaProcessor) -> Tensor:
    """Resize uint8[..., H, W] to uint8[..., height, width] as the torchvision processors of transformers do."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return tvF.resize(pixels, [height, width], interpolation=interpolation(processor), antialias=True)
