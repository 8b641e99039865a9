"""Computes the patch embedding as one matrix product: the same weights, 10 to 20 times faster where Conv3d is slow.

Kernel and stride of the Conv3d are both one patch, so it multiplies each flattened patch with the flattened weight.
torch 2.9 and Blackwell GPUs run such a Conv3d very slowly. transformers' own ``fusion_config`` replaces the module and
renames its weights at load and save; here only the computation changes, and the state dict stays as in transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwenvl_ft.upstream.layers import change_class

PATCH_EMBEDS = ("linear", "conv3d")
"""Values of ``model.patch_embed``."""
TAKES_RAW = "qwenvl_ft_takes_raw"
"""Attribute set on modules that have a `RawPatches` hook."""


class PatchConv3d(nn.Conv3d):
    """A Conv3d over single patches ``[P, C, T, H, W]`` -> ``[P, D, 1, 1, 1]``, computed as a matrix product.

    An image that is repeated T times (stride 0) is multiplied once, with the sum of the weight's T parts.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.stride(2) == 0:
            once = F.linear(input[:, :, 0].flatten(1), self.weight.sum(2).flatten(1), self.bias)  # [P, D]
            return once[:, :, None, None, None]
        flat = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)  # [P, D]
        return flat[:, :, None, None, None]


def use_linear_patch_embed(model: nn.Module) -> int:
    """Compute every patch embedding of ``model`` as a matrix product, and return their number.

    The module keeps its place and its parameters; only its class changes.
    """
    found = 0
    for name, module in model.named_modules():
        if name.endswith("patch_embed.proj") and type(module) is nn.Conv3d:
            if module.stride != module.kernel_size or module.padding != (0, 0, 0) or module.groups != 1:
                raise AssertionError(f"{name} is not a convolution over single patches: {module}")
            change_class(module, PatchConv3d)
            found += 1
    return found


def use_raw_patches(model: nn.Module, image_processor: Any) -> None:
    """Let every vision tower of ``model`` accept raw patches (data/media/patches.py) as well as its processor's.

    A raw patch has C * p * p values, the processor's T times as many. Raw patches are normalised as the processor does,
    in float32, and expanded to an image that is repeated T times.
    """
    scale = 1 / image_processor.rescale_factor
    mean, std = (torch.tensor(value) * scale for value in (image_processor.image_mean, image_processor.image_std))
    for name, module in model.named_modules():
        if name.endswith("patch_embed") and TAKES_RAW not in vars(module):
            module.register_forward_pre_hook(RawPatches(module.proj, mean, std))
            setattr(module, TAKES_RAW, True)


class RawPatches:
    """Forward pre-hook of a patch embedding: raw patches ``[P, C * p * p]`` of values 0 to 255 -> ``[P, C, T, p, p]``.

    Args:
        projection: the Conv3d of the patch embedding, which gives C, T and p.
        mean, std: float32[C], on the scale 0 to 255.
    """

    def __init__(self, projection: Any, mean: Tensor, std: Tensor) -> None:
        self.channels = projection.in_channels
        self.time, self.side, _ = projection.kernel_size
        self.scale: tuple[Tensor, ...] = mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
        (patches,) = arguments
        if patches.shape[-1] != self.channels * self.side**2:
            return None
        images = patches.view(-1, self.channels, self.side, self.side).float()
        mean, std = self.scale = tuple(value.to(patches.device) for value in self.scale)  # moved once, not each step
        normal = (images - mean) / std
        dtype = patches.dtype if patches.is_floating_point() else normal.dtype
        return normal.to(dtype)[:, :, None].expand(-1, -1, self.time, -1, -1)
