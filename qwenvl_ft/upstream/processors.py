"""Wraps the resizing rules of transformers' Qwen processors for images and videos, and their differences by version.

Grids are planned from file headers with the processors' own functions, so that training resizes media as inference with
the same transformers does. Relies on:

- ``smart_resize`` of ``models.qwen2_vl.image_processing_qwen2_vl`` and ``models.qwen3_vl.video_processing_qwen3_vl``:
  public names in model files, 5.5 to 5.24. The rule for videos counts an odd number of frames as one more and rejects
  frames smaller than a token up to 5.12; since 5.15 it rounds to even and enlarges such frames. If a name is missing, a
  copy of 5.24's rule is used (`RESIZING`), provided that the processors' public counts of patches agree with it.
- ``Qwen3VLVideoProcessor.cap_pixels_per_frame`` and ``max_video_tokens``: 5.16 to 5.24. transformers has announced that
  it will remove ``cap_pixels_per_frame`` and always apply the cap, so a processor that has ``max_video_tokens`` but not
  ``cap_pixels_per_frame`` counts as one that always does. Before 5.16 there is no cap, and a recipe that sets one is
  refused.
- ``backend``, a public property of image processors in 5.5 to 5.24, is "torchvision" for those based on torchvision.

``transformers.image_utils.pil_torch_interpolation_mapping`` is not used: `INTERPOLATIONS` has the same six pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Resampling
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import Feature, first, installed, takes

INTERPOLATIONS = {
    Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    Resampling.BOX: InterpolationMode.BOX,
    Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Resampling.HAMMING: InterpolationMode.HAMMING,
    Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Resampling.LANCZOS: InterpolationMode.LANCZOS,
}
"""A processor's ``resample`` (PIL's enumeration) -> the mode with which its torchvision backend resizes tensors."""

IMAGE_RULE = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
VIDEO_RULE = "transformers.models.qwen3_vl.video_processing_qwen3_vl"
PROBE_SIZES = (17, 40), (480, 641), (3000, 2000)
"""(height, width) on which the copied rules are compared: one is enlarged, one rounded, one shrunk."""
PROBE_FRAMES = 6
"""Even, because the public count of 5.16 to 5.18 omits the frame that is added to an odd number."""
RULE_ARGUMENTS = ("height", "width", "factor", "min_pixels", "max_pixels")


def image_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) of an image after resizing, as multiples of ``factor`` pixels.

    Raises:
        ValueError: the aspect ratio is too large.
    """
    return _rule(IMAGE_RULE)(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def video_size(
    frames: int, height: int, width: int, *, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return (height, width) of each frame after resizing; the areas are those of all frames together.

    Raises:
        ValueError: the aspect ratio is too large, or the frames are too small for this transformers.
    """
    return _rule(VIDEO_RULE)(
        num_frames=frames,
        height=height,
        width=width,
        temporal_factor=temporal_factor,
        factor=factor,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )


def require_known_rule(processor: Any) -> None:
    """If the processors' rules are missing, check that a processor counts as many patches as the copied rules.

    Raises:
        RecipeError: it does not.
    """
    if not RESIZING.missing():
        return
    parts = [(processor.image_processor, "get_number_of_image_patches", 1)]
    if shows_videos(processor.video_processor):
        parts.append((processor.video_processor, "get_num_of_video_patches", PROBE_FRAMES))
    for part, count, frames in parts:
        for height, width in PROBE_SIZES:
            steps = -(-frames // part.temporal_patch_size)
            size = _probed(part, frames, height, width)
            ours = steps * size[0] * size[1] // part.patch_size**2
            shape = (height, width) if frames == 1 else (frames, height, width)
            theirs = getattr(part, count)(*shape, {}) if hasattr(part, count) else None
            if theirs != ours:
                raise RecipeError(
                    f"{type(part).__name__} of {installed(('transformers',))} makes {theirs} patches of {width} x "
                    f"{height} pixels, but {ours} are expected. Install a version that docs/compatibility.md lists."
                )


def _probed(part: Any, frames: int, height: int, width: int) -> tuple[int, int]:
    """Return the size after resizing by the rules in use, with a processor's settings."""
    settings = {"factor": part.patch_size * part.merge_size, "min_pixels": part.size["shortest_edge"]}
    if frames == 1:
        return image_size(height, width, max_pixels=part.size["longest_edge"], **settings)
    most = most_of_video(part, frames)
    return video_size(frames, height, width, temporal_factor=part.temporal_patch_size, max_pixels=most, **settings)


def interpolation(processor: Any) -> Any:
    """Return torchvision's interpolation mode of a processor."""
    mode = INTERPOLATIONS.get(processor.resample, processor.resample)
    return _lanczos() if mode is InterpolationMode.LANCZOS else mode


def is_torchvision(image_processor: Any) -> bool:
    """Return True if an image processor resizes with torchvision."""
    return getattr(image_processor, "backend", "") == "torchvision"


def shows_videos(video_processor: Any) -> bool:
    """Return True for the video processor of Qwen3-VL, whose text gives the time of each frame."""
    from transformers import Qwen3VLVideoProcessor

    return isinstance(video_processor, Qwen3VLVideoProcessor)


def most_of_video(processor: Any, frames: int) -> int:
    """Return the largest area of all frames of a video together, with the processor's cap per frame if it is on."""
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not _caps(processor):
        return int(most)
    cap = processor.max_video_tokens * (processor.patch_size * processor.merge_size) ** 2
    return int(max(min(cap, most // frames), int(least * 1.05)) * frames)


def set_frame_cap(processor: Any, tokens: int) -> None:
    """Limit every frame to this number of tokens.

    Raises:
        RecipeError: this transformers has no cap.
    """
    if not hasattr(processor, "max_video_tokens"):
        CAP.require("template.video_frame_max_pixels")
    processor.max_video_tokens = tokens
    if hasattr(processor, "cap_pixels_per_frame"):
        processor.cap_pixels_per_frame = True


def frame_cap(processor: Any) -> int | None:
    """Return the most tokens of a frame; None without a cap.

    A call of a processor can turn the cap on (``cap_pixels_per_frame``), but the number is that of the processor alone.
    """
    return int(processor.max_video_tokens) if _caps(processor) else None


def video_patches(processor: Any, clips: Sequence[torch.Tensor], rates: Sequence[float]) -> Any:
    """Process frames that are sampled and resized already.

    Args:
        clips: uint8[F, 3, H, W] each.
        rates: frames per second of each clip; the result does not depend on them, because the text has the times.
    """
    from transformers.video_utils import VideoMetadata

    options: dict[str, Any] = {"do_resize": False, "do_sample_frames": False, "return_tensors": "pt"}
    if hasattr(processor, "cap_pixels_per_frame"):
        options["cap_pixels_per_frame"] = False  # no effect without resizing, but transformers warns if it is not set
    metadata = [VideoMetadata(total_num_frames=len(clip), fps=rate) for clip, rate in zip(clips, rates, strict=True)]
    return processor(videos=list(clips), video_metadata=metadata, **options)


def _caps(processor: Any) -> bool:
    """Return True if the cap per frame is on."""
    if not hasattr(processor, "max_video_tokens"):
        return False
    return bool(getattr(processor, "cap_pixels_per_frame", True))


@cache
def _lanczos() -> InterpolationMode:
    """Return LANCZOS, or BICUBIC before torchvision 0.27, which lacks it for tensors; transformers does the same."""
    try:
        resize(torch.zeros(3, 4, 4, dtype=torch.uint8), [2, 2], interpolation=InterpolationMode.LANCZOS)
    except (ValueError, TypeError, NotImplementedError):
        return InterpolationMode.BICUBIC
    return InterpolationMode.LANCZOS


@cache
def _rule(module: str) -> Callable[..., tuple[int, int]]:
    """Return ``smart_resize`` of a module of transformers, or its copy if it is missing."""
    if _no_rule(module):
        return _image_rule if module == IMAGE_RULE else _video_rule
    rule: Callable[..., tuple[int, int]] = import_module(module).smart_resize
    return rule


def _no_rule(module: str) -> str:
    try:
        rule = import_module(module).smart_resize
    except (ImportError, AttributeError):
        return f"has no {module}.smart_resize"
    more = ("num_frames", "temporal_factor") if module == VIDEO_RULE else ()
    return takes(rule, *RULE_ARGUMENTS, *more)


def _image_rule(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Source: ``smart_resize`` of transformers 5.24, models/qwen2_vl/image_processing_qwen2_vl.py."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError(
            f"absolute aspect ratio must be smaller than 200, got {max(height, width) / min(height, width)}"
        )
    sizes = round(height / factor) * factor, round(width / factor) * factor
    if sizes[0] * sizes[1] > max_pixels:
        return _fitted(height, width, factor, math.sqrt(height * width / max_pixels))
    if sizes[0] * sizes[1] < min_pixels:
        return _filled(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return sizes


def _video_rule(
    num_frames: int, height: int, width: int, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Source: ``smart_resize`` of transformers 5.24, models/qwen3_vl/video_processing_qwen3_vl.py."""
    if num_frames < temporal_factor:
        raise ValueError(f"t:{num_frames} must be larger than temporal_factor:{temporal_factor}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(
            f"absolute aspect ratio must be smaller than 200, got {max(height, width) / min(height, width)}"
        )
    sizes = round(height / factor) * factor, round(width / factor) * factor
    area = round(num_frames / temporal_factor) * temporal_factor * sizes[0] * sizes[1]
    if area > max_pixels:
        return _fitted(height, width, factor, math.sqrt(num_frames * height * width / max_pixels))
    if area < min_pixels:
        return _filled(height, width, factor, math.sqrt(min_pixels / (num_frames * height * width)))
    return sizes


def _fitted(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def _filled(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


@cache
def _no_cap() -> str:
    from transformers import Qwen3VLVideoProcessor

    found = hasattr(Qwen3VLVideoProcessor, "max_video_tokens")
    return "" if found else "has no Qwen3VLVideoProcessor.max_video_tokens (5.16 is the first that has)"


RESIZING = Feature(
    name="resizing of images and videos by the processors' own rule",
    missing=cache(lambda: first(_no_rule(IMAGE_RULE), _no_rule(VIDEO_RULE))),
    instead="a copy of transformers 5.24's rule is used if its patch counts agree with the processor's; otherwise the "
    "run is refused",
)
CAP = Feature(
    name="the per-frame pixel cap for videos",
    missing=_no_cap,
)
FEATURES = (RESIZING,)
