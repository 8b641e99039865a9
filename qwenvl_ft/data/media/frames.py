"""How many frames, pages or slices does an image file have, if it has several, and which one is shown?

Planning learns it where it reads the size (`image_header`). Here the first bytes rule out nearly all files.
"""

from collections.abc import Iterable
from typing import Any

from qwenvl_ft.data.media.images import chosen_reading, unchosen_of
from qwenvl_ft.data.media.opening import MediaPolicy, file_of, medium_name, opened_image

HEAD = 48
"""Bytes that tell whether a file may have several frames."""


def first_frame_line(dataset: str, count: int, example: str) -> str:
    """Say for how many images of a data set the first of several frames is shown, and what chooses another.

    Args:
        example: one of `unchosen`.
    """
    kind = "image is a file" if count == 1 else "images are files"
    return (
        f"{dataset}: {count:,} {kind} of several frames or pages, of which frame 0 is shown, e.g. {example}; "
        "data.image_frame chooses another, also as a key of a data set's entry or of a record"
    )


def unchosen(values: Iterable[Any], policy: MediaPolicy) -> tuple[str, ...]:
    """Return ``PATH (5 frames)`` for each image that has several frames of which none was chosen.

    Raises:
        DataError: an image cannot be opened.
    """
    every = list(values)
    return named_frames(every, (unchosen_frames(value, policy) for value in every), policy)


def named_frames(values: Iterable[Any], counts: Iterable[int], policy: MediaPolicy) -> tuple[str, ...]:
    """Return ``PATH (5 frames)`` for each image whose number of frames is not 0."""
    pairs = zip(values, counts, strict=True)
    return tuple(frames_text(chosen_reading(value, policy)[0], frames) for value, frames in pairs if frames)


def frames_text(value: Any, frames: int) -> str:
    """Name an image with the number of its frames."""
    return f"{medium_name(value)} ({frames} frames)"


def unchosen_frames(value: Any, policy: MediaPolicy) -> int:
    """Return the number of frames of an image that has several of which none was chosen; 0 for any other image.

    Raises:
        DataError: the image cannot be opened.
    """
    value, reading = chosen_reading(value, policy)
    if reading.image_frame is not None or not _may_have_several(value):
        return 0
    with opened_image(value, policy, reading) as image:
        return unchosen_of(image, reading)


def _may_have_several(value: Any) -> bool:
    """Judge a file or bytes by the first bytes; URLs, base64 and PIL images are not looked at."""
    if isinstance(value, bytes):
        head = value[:HEAD]
    else:
        path = file_of(value)
        if path is None or path.lower().endswith((".jpg", ".jpeg")):
            return False
        if path.lower().endswith(".dcm"):
            return True
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - runs for every image
                head = file.read(HEAD) or b""
        except OSError:
            return False
    animated = head[:4] == b"RIFF" and head[12:16] == b"VP8X" and bool(head[20] & 2)
    return head.startswith((b"GIF8", b"II", b"MM")) or animated or head[37:41] == b"acTL" or head[4:12] == b"ftypavis"
