"""Choose the frames of a video from its header, and decode and resize them.

Frames are sampled as transformers' ``Qwen3VLVideoProcessor`` does: evenly from the first to the last, ``fps`` per
second, at least ``min_frames`` and at most ``max_frames``.

Letters: F sampled frames, H, W their size in pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenvl_ft.data.conversation import Sampling, Source, Video
from qwenvl_ft.data.media.deadline import within
from qwenvl_ft.data.media.elsewhere import absent
from qwenvl_ft.data.media.grids import Grid, MediaProcessor, exact_size
from qwenvl_ft.data.media.images import MediaPolicy, file_of, image_size, medium_name, open_image
from qwenvl_ft.data.media.patches import resized
from qwenvl_ft.data.media.refused import MAX_ASPECT, SKIP, no_videos, require_area, too_thin
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.upstream import processors

DEFAULT_FPS = 2.0
"""Frames per second of a list of frames without ``fps``; the rate at which the released models sample videos."""
MOV = "mov"
"""Part of the format name of containers (mp4, mov, 3gp) that may rotate a video and hide frames of it."""


class VideoProcessor(MediaProcessor, Protocol):
    """The settings of transformers' video processor that decide the frames."""

    temporal_patch_size: int
    fps: float | None
    min_frames: int
    max_frames: int


@dataclass(frozen=True)
class Footage:
    """The properties of a video file, or of a list of frames."""

    frames: int
    rate: float
    """Frames per second."""
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """The frames of a video that the model sees."""

    indices: tuple[int, ...]
    """[F] frame numbers in the video."""
    rate: float
    """Frames per second of the video."""
    size: tuple[int, int]
    """(height, width) of the video after rotation."""
    grid: Grid
    """Number of patches along time, height, width."""

    def times(self, step: int) -> list[float]:
        """Return the time in seconds of each group of ``step`` frames: the mean of its first and last frame.

        A last group with too few frames repeats its last frame.
        """
        padded = [*self.indices, *self.indices[-1:] * (-len(self.indices) % step)]
        seconds = [index / self.rate for index in padded]
        return [(seconds[k] + seconds[k + step - 1]) / 2 for k in range(0, len(padded), step)]


def plan_clip(video: Video, processor: VideoProcessor, policy: MediaPolicy, source: Source) -> Clip:
    """Choose the frames and the grid of a video, from its header.

    Raises:
        DataError: the video cannot be opened, has too few frames, or the processor is not Qwen3-VL's.
        TooLarge: its frames have too many pixels.
        TooThin: the processor refuses the aspect ratio of its frames.
    """
    if not processors.shows_videos(processor):
        raise no_videos(source, processor)
    try:
        footage = _frame_list(video, policy) if isinstance(video.value, (list, tuple)) else _file(video.value, policy)
        indices = _sampled(video, footage, processor)
        height, width = _size(video, footage, len(indices), processor)
    except DataError as error:
        raise type(error)(f"{source}: {error}") from None
    steps = -(-len(indices) // processor.temporal_patch_size)
    grid = (steps, height // processor.patch_size, width // processor.patch_size)
    return Clip(tuple(indices.tolist()), footage.rate, (footage.height, footage.width), grid)


def clip_frames(video: Video, clip: Clip, policy: MediaPolicy, source: Source) -> Iterator[NDArray[np.uint8]]:
    """Yield the clip's frames uint8[height, width, 3], in the size of the video.

    Raises:
        DataError: a frame cannot be decoded, or the file takes longer than ``policy.video_timeout``.
    """
    if isinstance(video.value, (list, tuple)):
        frames: Iterator[NDArray[np.uint8]] = (np.array(open_image(video.value[k], policy)) for k in clip.indices)
    else:
        value, count = video.value, len(clip.indices)
        frames = within(
            lambda: _decoded(value, clip.indices, policy),
            policy.video_timeout,
            lambda arrived: _late(value, policy, (arrived, count)),
        )
    try:
        for frame in frames:
            if frame.shape[:2] != clip.size:
                raise DataError(
                    f"video {medium_name(video.value)} has a frame of (height, width) {frame.shape[:2]}, but its "
                    f"header says {clip.size}. Was it changed?"
                )
            yield frame
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def clip_pixels(video: Video, clip: Clip, processor: VideoProcessor, policy: MediaPolicy, source: Source) -> Tensor:
    """Return the clip's frames uint8[F, 3, H, W], each resized as soon as it is decoded.

    Raises:
        DataError: see `clip_frames`.
    """
    height, width = clip.grid[1] * processor.patch_size, clip.grid[2] * processor.patch_size
    return torch.stack(
        [
            resized(torch.from_numpy(frame).permute(2, 0, 1), height, width, processor)
            for frame in clip_frames(video, clip, policy, source)
        ]
    )


def sample_frames(total: int, rate: float, fps: float, min_frames: int, max_frames: int) -> NDArray[np.int64]:
    """Return frame numbers int64[F] of ``total`` frames at ``fps`` per second, evenly from the first to the last."""
    count = min(max(int(total / rate * fps), min_frames), max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def _frame_list(video: Video, policy: MediaPolicy) -> Footage:
    if video.sampling != Sampling():
        raise DataError(
            "frames are sampled from video files only; a list of frames is used whole. Drop the frame settings."
        )
    sizes = {image_size(frame, policy) for frame in video.value}
    if len(sizes) != 1:
        raise DataError(f"the frames of a video have different sizes (height, width): {sorted(sizes)[:3]}.")
    return Footage(len(video.value), video.fps or DEFAULT_FPS, *sizes.pop())


def _file(value: Any, policy: MediaPolicy) -> Footage:
    """Read a file's header within the time limit."""
    (footage,) = within(lambda: _header(value, policy), policy.video_timeout, lambda _: _late(value, policy))
    return footage


def _late(value: Any, policy: MediaPolicy, frames: tuple[int, int] | None = None) -> DataError:
    """Return the error for a file that takes too long.

    Args:
        frames: (frames that arrived in time, frames of the clip).
    """
    progress = f": {frames[0]} of its {frames[1]} frames arrived" if frames else ""
    return DataError(
        f"video {medium_name(value)} cannot be read within data.video_timeout={policy.video_timeout:g} s{progress}. Is "
        f"its disk or network slow? Re-encode it, raise the limit, {SKIP}."
    )


def _header(value: Any, policy: MediaPolicy) -> Iterator[Footage]:
    """Yield the content of a file's header.

    Containers that may rotate a video store the rotation with its frames, so the first frame is decoded there.
    """
    with _opened(value, policy) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        rotated = False
        height, width = stream.codec_context.height, stream.codec_context.width
        visible = [entry for entry in stream.index_entries if not entry.is_discard]
        frames = len(visible) if MOV in container.format.name else stream.frames
        if MOV in container.format.name or not height or not width:
            first = next(container.decode(stream))
            height, width, rotated = first.height, first.width, first.rotation % 180 != 0
        if not frames:  # the headers of mkv and webm have no count: count packets, without decoding
            container.seek(0)
            frames = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        require_area(f"a frame of video {medium_name(value)}", width, height, policy.max_image_pixels)
        if not rate or frames < 1:
            raise DataError(f"video {medium_name(value)} is damaged: it has {frames} frames at a rate of {rate}.")
        yield Footage(frames, float(rate), *((width, height) if rotated else (height, width)))


def _sampled(video: Video, footage: Footage, processor: VideoProcessor) -> NDArray[np.int64]:
    """Return the frame numbers int64[F] of the clip."""
    sampling = video.sampling
    first, last = 0, footage.frames - 1
    if sampling.start is not None:
        first = ceil(sampling.start * footage.rate)
    if sampling.end is not None:
        last = min(floor(sampling.end * footage.rate), last)
    total = last - first + 1
    if isinstance(video.value, (list, tuple)):
        indices = np.arange(footage.frames)
    elif sampling.num_frames is not None:
        indices = np.linspace(0, total - 1, min(sampling.num_frames, max(total, 0))).round().astype(np.int64)
    else:
        fewest = processor.min_frames if sampling.min_frames is None else sampling.min_frames
        most = processor.max_frames if sampling.max_frames is None else sampling.max_frames
        fps = video.fps or processor.fps or footage.rate
        indices = sample_frames(max(total, 0), footage.rate, fps, fewest, most)
    if indices.size < processor.temporal_patch_size:
        raise DataError(
            f"video {medium_name(video.value)} shows {indices.size} of {footage.frames} frames "
            f"({footage.frames / footage.rate:.2f} s), but needs at least {processor.temporal_patch_size}. Give a "
            "single frame as an image; check start and end."
        )
    return indices + first


def _size(video: Video, footage: Footage, frames: int, processor: VideoProcessor) -> tuple[int, int]:
    """Return (height, width) after resizing; the area limits are for all frames together.

    Raises:
        DataError: the processor refuses the size; `TooThin` if it is the aspect ratio.
    """
    limits, factor = video.limits, processor.patch_size * processor.merge_size
    if not processor.do_resize:
        return footage.height, footage.width
    if limits.resized_height is not None and limits.resized_width is not None:
        return exact_size(limits.resized_height, limits.resized_width, factor)
    min_pixels, max_pixels = processor.size["shortest_edge"], processors.most_of_video(processor, frames)
    if limits.total_pixels is not None:
        max_pixels = min(max_pixels, limits.total_pixels)
    if limits.max_pixels is not None:
        max_pixels = min(max_pixels, limits.max_pixels * frames)
    min_pixels = min(min_pixels, max_pixels)
    if limits.min_pixels is not None:
        min_pixels = limits.min_pixels * frames
        max_pixels = max(min_pixels, max_pixels)
    try:
        return processors.video_size(
            frames,
            footage.height,
            footage.width,
            temporal_factor=processor.temporal_patch_size,
            factor=factor,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
    except ValueError as error:
        what = f"a frame of video {medium_name(video.value)}"
        if max(footage.height, footage.width) >= MAX_ASPECT * min(footage.height, footage.width):
            raise too_thin(what, footage.width, footage.height) from None
        raise DataError(f"{what} has {footage.width} x {footage.height} pixels: {one_line(error)}.") from None


def _decoded(value: Any, indices: tuple[int, ...], policy: MediaPolicy) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames at ``indices``, which ascend, as uint8[H, W, 3], rotated upright."""
    remaining = iter(indices)
    index, seen = next(remaining), 0
    with _opened(value, policy) as container:
        for frame in container.decode(container.streams.video[0]):
            if seen == index:
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                index = next(remaining, -1)
                if index < 0:
                    return
            seen += 1
    raise DataError(
        f"video {medium_name(value)} is damaged: its header promises more frames than the {seen} that can be decoded; "
        f"frame {index} is missing. Re-encode it, {SKIP}."
    )


@contextmanager
def _opened(value: Any, policy: MediaPolicy) -> Iterator[Any]:
    """Open a container that has a video stream; every failure, also while reading it, becomes a `DataError`."""
    try:
        import av
    except ImportError:
        raise DataError("video files need PyAV: pip install 'qwenvl_ft[video]', or give lists of frames.") from None
    name = medium_name(value)
    path = file_of(value)
    if path is None and not isinstance(value, (bytes, bytearray, memoryview)):
        raise DataError(f"video {name} cannot be opened. Give a path, bytes or a list of frames; download URLs.")
    try:
        with av.open(path or io.BytesIO(value), timeout=policy.video_timeout) as container:
            if not container.streams.video:
                raise DataError(f"video {name} has no video stream, only {len(container.streams)} other streams.")
            yield container
    except FileNotFoundError:
        raise DataError(absent("video", value)) from None
    except IsADirectoryError:
        raise DataError(f"video {name} is a folder. Give a file or a list of frames.") from None
    except av.error.ExitError:
        raise _late(value, policy) from None
    except (av.FFmpegError, StopIteration, OSError) as error:
        cause = one_line(error) if str(error) else "no frame can be decoded"
        raise DataError(f"video {name} is damaged or not a video: {cause}. Replace the file, {SKIP}.") from None
