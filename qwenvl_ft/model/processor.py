"""Sets the sizes of images and videos, and the frame sampling, of a loaded processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError

if TYPE_CHECKING:
    from qwenvl_ft.recipe.sections.data import TemplateConfig


def set_limits(
    processor: Any,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_min_pixels: int | None = None,
    video_max_pixels: int | None = None,
    video_frame_max_pixels: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> None:
    """Set the sizes of images and videos and the sampling of frames; None keeps the processor's value.

    Args:
        min_pixels: smallest area of an image after resizing, in pixels; one token of Qwen3-VL covers 32 x 32. None
            keeps the checkpoint's value, lowered if it would exceed ``max_pixels``.
        max_pixels: largest area of an image, likewise.
        video_min_pixels: smallest area of a video, all its frames together.
        video_max_pixels: largest area of a video, all its frames together.
        video_frame_max_pixels: largest area of one frame, rounded down to whole tokens.
        fps: frames per second that are sampled from a video file.
        min_frames: fewest frames sampled from a file, if it has that many.
        max_frames: most frames sampled from a file.

    Raises:
        RecipeError: a minimum above its maximum, or an area below 1.
    """
    set_areas(processor.image_processor, "", min_pixels, max_pixels)
    video = processor.video_processor
    set_areas(video, "video_", video_min_pixels, video_max_pixels)
    set_frames(video, max_area=video_frame_max_pixels, fps=fps, min_frames=min_frames, max_frames=max_frames)


def set_template_limits(processor: Any, template: TemplateConfig) -> None:
    """Set the pixel limits and frame rates of a recipe's ``template`` section; see `set_limits`."""
    set_limits(
        processor,
        min_pixels=template.min_pixels,
        max_pixels=template.max_pixels,
        video_min_pixels=template.video_min_pixels,
        video_max_pixels=template.video_max_pixels,
        video_frame_max_pixels=template.video_frame_max_pixels,
        fps=template.fps,
        min_frames=template.fps_min_frames,
        max_frames=template.fps_max_frames,
    )


def set_areas(processor: Any, prefix: str, smallest: int | None, largest: int | None) -> None:
    """Set the smallest and largest area, in pixels after resizing, of an image or video processor.

    A limit that is None keeps the checkpoint's value, unless that contradicts the other limit.

    Args:
        prefix: ``""`` or ``"video_"``, for the recipe keys that errors name.

    Raises:
        RecipeError: an area below 1, or a minimum above its maximum.
    """
    size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
    for key, value in ((f"{prefix}min_pixels", smallest), (f"{prefix}max_pixels", largest)):
        if value is not None and value < 1:
            raise RecipeError(f"template.{key}={value} is not an area. Give a number of pixels, e.g. 262144.")
    if smallest is not None and largest is not None and smallest > largest:
        raise RecipeError(
            f"template.{prefix}min_pixels={smallest} is above template.{prefix}max_pixels={largest}. Swap them."
        )
    if smallest is not None:
        size = {"shortest_edge": smallest, "longest_edge": max(smallest, size["longest_edge"])}
    if largest is not None:
        size = {"shortest_edge": min(size["shortest_edge"], largest), "longest_edge": largest}
    processor.size = type(processor.size)(**size)


def set_frames(
    processor: Any, *, max_area: int | None, fps: float | None, min_frames: int | None, max_frames: int | None
) -> None:
    """Set which frames a video processor samples, and the largest area of one frame in pixels.

    Raises:
        RecipeError: ``min_frames`` above ``max_frames``, or this transformers cannot limit the area of a frame.
    """
    if max_area is not None:
        from qwenvl_ft.upstream.processors import set_frame_cap

        tokens = max_area // (processor.patch_size * processor.merge_size) ** 2
        set_frame_cap(processor, max(tokens, 1))
    for name, value in {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}.items():
        if value is not None:
            setattr(processor, name, value)
    if processor.min_frames > processor.max_frames:
        if min_frames is not None and max_frames is not None:
            raise RecipeError(
                f"template.fps_min_frames={min_frames} is above template.fps_max_frames={max_frames}. Swap them."
            )
        if max_frames is not None:
            processor.min_frames = max_frames
        else:
            processor.max_frames = processor.min_frames
