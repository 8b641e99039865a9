"""Images as the bytes they are: resized as the processor resizes, neither normalised nor repeated in time.

A patch of the processor is float32 and holds the same picture ``temporal_patch_size`` times: eight times these bytes.
What is left out here, `qwenvl_ft.model.patch_embed` does on the device.

Letters: P patches, C channels, p patch side, T temporal patch size.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import pil_torch_interpolation_mapping

STANDARD = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
"""Settings of an image processor of which raw patches are the first half."""


def obstacle(image_processor: Any) -> str:
    """Why an image processor's patches cannot be made from raw ones; empty if they can."""
    from transformers.image_processing_backends import TorchvisionBackend

    if not isinstance(image_processor, TorchvisionBackend):
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
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [C, H, W]
    pixels = resized(pixels, high * side, wide * side, image_processor)
    channels = pixels.shape[0]
    blocks = pixels.reshape(channels, high // merge, merge, side, wide // merge, merge, side)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(high * wide, channels * side * side)


def resized(pixels: Tensor, height: int, width: int, processor: Any) -> Tensor:
    """uint8[..., height, width] of uint8[..., H, W], as the torchvision processors of transformers resize."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    mode = pil_torch_interpolation_mapping.get(processor.resample, processor.resample)
    return tvF.resize(pixels, [height, width], interpolation=mode, antialias=True)
