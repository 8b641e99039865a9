"""Which frames of a video are shown, when, and their pixels; the plan needs the file's header alone.

Frames are chosen as transformers' ``Qwen3VLVideoProcessor`` chooses them: evenly from the first to the last, ``fps`` a
second, at least ``min_frames`` and at most ``max_frames``.

Letters: F shown frames, H, W their size in pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenvl_ft.data.conversation import Sampling, Source, Video
from qwenvl_ft.data.media.deadline import within
from qwenvl_ft.data.media.grids import Grid, exact_size
from qwenvl_ft.data.media.images import MediaPolicy, file_of, image_size, medium_name, open_image
from qwenvl_ft.data.media.patches import resized
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.upstream import processors

DEFAULT_FPS = 2.0
"""Frames a second of a list of frames that does not say; the rate at which the released models sample videos."""
MOV = "mov"
"""Part of the name of the containers (mp4, mov, 3gp) that may turn a video and hide frames of it."""


@dataclass(frozen=True)
class Footage:
    """What a video holds."""

    frames: int
    rate: float
    """Frames a second."""
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """What of a video is shown."""

    indices: tuple[int, ...]
    """[F] frames of the video."""
    rate: float
    """Frames of the video a second."""
    size: tuple[int, int]
    """Height and width of the video, upright."""
    grid: Grid
    """Patches along time, height, width."""

    def times(self, step: int) -> list[float]:
        """Seconds of each ``step`` frames: the mean of the first and the last; a short last one repeats its last."""
        padded = [*self.indices, *self.indices[-1:] * (-len(self.indices) % step)]
        seconds = [index / self.rate for index in padded]
        return [(seconds[k] + seconds[k + step - 1]) / 2 for k in range(0, len(padded), step)]


def plan_clip(video: Video, processor: Any, policy: MediaPolicy, source: Source) -> Clip:
    """The frames and the grid of a video, from its header.

    Raises:
        DataError: the video cannot be opened, has too few frames, or the processor knows no videos.
    """
    if not processors.shows_videos(processor):
        raise DataError(f"{source}: videos need a Qwen3-VL processor, not {type(processor).__name__}.")
    try:
        footage = _listed(video, policy) if isinstance(video.value, (list, tuple)) else _filmed(video.value, policy)
        indices = _chosen(video, footage, processor)
        height, width = _size(video, footage, len(indices), processor)
    except ValueError as error:  # DataError, or the resize rule's own limit on the aspect ratio
        raise DataError(f"{source}: {error}") from None
    steps = -(-len(indices) // processor.temporal_patch_size)
    grid = (steps, height // processor.patch_size, width // processor.patch_size)
    return Clip(tuple(indices.tolist()), footage.rate, (footage.height, footage.width), grid)


def clip_pixels(video: Video, clip: Clip, processor: Any, policy: MediaPolicy, source: Source) -> Tensor:
    """uint8[F, 3, H, W]: the shown frames, each resized as soon as it is decoded.

    Raises:
        DataError: a frame cannot be decoded, or the file takes longer than ``policy.video_timeout``.
    """
    height, width = clip.grid[1] * processor.patch_size, clip.grid[2] * processor.patch_size
    if isinstance(video.value, (list, tuple)):
        frames: Iterator[NDArray[np.uint8]] = (np.array(open_image(frame, policy)) for frame in video.value)
    else:
        value, count = video.value, len(clip.indices)
        frames = within(
            lambda: _decoded(value, clip.indices, policy),
            policy.video_timeout,
            lambda came: _late(value, policy, (came, count)),
        )
    shown = []
    try:
        for frame in frames:
            if frame.shape[:2] != clip.size:
                raise DataError(
                    f"video {medium_name(video.value)} has a frame of (height, width) {frame.shape[:2]}, but its "
                    f"header says {clip.size}. Was it changed?"
                )
            shown.append(resized(torch.from_numpy(frame).permute(2, 0, 1), height, width, processor))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return torch.stack(shown)


def spread(total: int, rate: float, fps: float, least: int, most: int) -> NDArray[np.int64]:
    """Frames of ``total`` at ``fps`` a second, evenly from the first to the last."""
    count = min(max(int(total / rate * fps), least), most, total)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def _listed(video: Video, policy: MediaPolicy) -> Footage:
    if video.sampling != Sampling():
        raise DataError(
            "frames are chosen from a video file; a list of frames is shown whole. Drop the frame settings."
        )
    sizes = {image_size(frame, policy) for frame in video.value}
    if len(sizes) != 1:
        raise DataError(f"the frames of a video have several sizes (height, width): {sorted(sizes)[:3]}.")
    return Footage(len(video.value), video.fps or DEFAULT_FPS, *sizes.pop())


def _filmed(value: Any, policy: MediaPolicy) -> Footage:
    """A file's header."""
    (footage,) = within(lambda: _header(value, policy), policy.video_timeout, lambda _: _late(value, policy))
    return footage


def _late(value: Any, policy: MediaPolicy, frames: tuple[int, int] | None = None) -> DataError:
    """The error for a file that takes too long; (frames that came, frames that are shown)."""
    shown = f": {frames[0]} of its {frames[1]} frames came" if frames else ""
    return DataError(
        f"video {medium_name(value)} cannot be read within data.video_timeout={policy.video_timeout:g} s{shown}. Is "
        "its disk or network slow? Re-encode it, drop the record, or raise the limit."
    )


def _header(value: Any, policy: MediaPolicy) -> Iterator[Footage]:
    """A file's header; of containers that may turn a video also its first frame, which alone says so."""
    with _opened(value, policy) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        turned = False
        height, width = stream.codec_context.height, stream.codec_context.width
        shown = [entry for entry in stream.index_entries if not entry.is_discard]
        frames = len(shown) if MOV in container.format.name else stream.frames
        if MOV in container.format.name or not height or not width:
            first = next(container.decode(stream))
            height, width, turned = first.height, first.width, first.rotation % 180 != 0
        if not frames:  # mkv, webm: no header says; packets are counted, not decoded
            container.seek(0)
            frames = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
        if height * width > policy.max_image_pixels:
            raise DataError(
                f"video {medium_name(value)} has frames of {width} x {height} = {width * height} pixels, above "
                f"data.max_image_pixels={policy.max_image_pixels}. Shrink the file or raise the limit."
            )
        if not rate or frames < 1:
            raise DataError(f"video {medium_name(value)} is damaged: it has {frames} frames at a rate of {rate}.")
        yield Footage(frames, float(rate), *((width, height) if turned else (height, width)))


def _chosen(video: Video, footage: Footage, processor: Any) -> NDArray[np.int64]:
    told = video.sampling
    first, last = 0, footage.frames - 1
    if told.start is not None:
        first = ceil(told.start * footage.rate)
    if told.end is not None:
        last = min(floor(told.end * footage.rate), last)
    total = last - first + 1
    if isinstance(video.value, (list, tuple)):
        indices = np.arange(footage.frames)
    elif told.num_frames is not None:
        indices = np.linspace(0, total - 1, min(told.num_frames, max(total, 0))).round().astype(np.int64)
    else:
        least = processor.min_frames if told.min_frames is None else told.min_frames
        most = processor.max_frames if told.max_frames is None else told.max_frames
        indices = spread(max(total, 0), footage.rate, video.fps or processor.fps or footage.rate, least, most)
    if indices.size < processor.temporal_patch_size:
        raise DataError(
            f"video {medium_name(video.value)} shows {indices.size} of {footage.frames} frames "
            f"({footage.frames / footage.rate:.2f} s), {processor.temporal_patch_size} are the least. Give a single "
            "frame as an image; check start and end."
        )
    return indices + first


def _size(video: Video, footage: Footage, frames: int, processor: Any) -> tuple[int, int]:
    """(height, width) after resizing."""
    limits, factor = video.limits, processor.patch_size * processor.merge_size
    if not processor.do_resize:
        return footage.height, footage.width
    if limits.resized_height is not None and limits.resized_width is not None:
        return exact_size(limits.resized_height, limits.resized_width, factor)
    least, most = processor.size["shortest_edge"], processors.most_of_video(processor, frames)
    if limits.total_pixels is not None:
        most = min(most, limits.total_pixels)
    if limits.max_pixels is not None:
        most = min(most, limits.max_pixels * frames)
    least = min(least, most)
    if limits.min_pixels is not None:
        least = limits.min_pixels * frames
        most = max(least, most)
    return processors.video_size(
        frames,
        footage.height,
        footage.width,
        temporal_factor=processor.temporal_patch_size,
        factor=factor,
        min_pixels=least,
        max_pixels=most,
    )


def _decoded(value: Any, indices: tuple[int, ...], policy: MediaPolicy) -> Iterator[NDArray[np.uint8]]:
    """uint8[H, W, 3] of each index, upright; indices ascend."""
    wanted = iter(indices)
    index, seen = next(wanted), 0
    with _opened(value, policy) as container:
        for frame in container.decode(container.streams.video[0]):
            if seen == index:
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                index = next(wanted, -1)
                if index < 0:
                    return
            seen += 1
    raise DataError(
        f"video {medium_name(value)} is damaged: its header promises more frames than the {seen} that can be decoded, "
        f"frame {index} is wanted. Re-encode it or drop the record."
    )


@contextmanager
def _opened(value: Any, policy: MediaPolicy) -> Iterator[Any]:
    """The file as a container with a video stream; whatever goes wrong with it is a `DataError`."""
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
                raise DataError(f"video {name} has no pictures, only {len(container.streams)} other streams.")
            yield container
    except FileNotFoundError:
        raise DataError(f"video {name} does not exist. Relative paths start at data.media_root.") from None
    except IsADirectoryError:
        raise DataError(f"video {name} is a folder. Give a file or a list of frames.") from None
    except av.error.ExitError:
        raise _late(value, policy) from None
    except (av.FFmpegError, StopIteration, OSError) as error:
        cause = one_line(error) if str(error) else "no frame can be decoded"
        raise DataError(f"video {name} is damaged or no video: {cause}. Replace the file or drop the record.") from None
