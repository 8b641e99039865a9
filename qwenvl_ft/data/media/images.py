"""Open images as the official processing does, and read their size from the header alone.

An image's value is an absolute path, a ``data:`` URI or plain base64, an allowed URL, bytes, a PIL image, any of these
with settings of its own (`ReadAs`), or a `LazyImage`. Values deeper than 8 bits are converted as the settings say
(high_bit_depth.py).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from qwenvl_ft.data.media.deep_files import deep_mode, deep_pixels
from qwenvl_ft.data.media.elsewhere import MediaPath, require_inside
from qwenvl_ft.data.media.high_bit_depth import DeepPixels, to_8_bit
from qwenvl_ft.data.media.jpeg import jpeg_size
from qwenvl_ft.data.media.medical_files import MedicalFile
from qwenvl_ft.data.media.opening import ORIENTATION, opened_image
from qwenvl_ft.data.media.opening import MediaPolicy as MediaPolicy
from qwenvl_ft.data.media.opening import file_of as file_of
from qwenvl_ft.data.media.opening import medium_name as medium_name
from qwenvl_ft.data.media.reading import ERROR, ReadAs, Reading, lacks_window

TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
MEASURED = {"JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA"}
"""Formats whose header holds the size of the decoded image; images of other formats are decoded to be measured."""
SEVERAL = ("TIFF", "GIF", "WEBP", "PNG", "AVIF", "DICOM")
"""Formats whose further frames are pictures of their own. An MPO holds previews and gain maps of one photo."""


class Header(NamedTuple):
    """What the header of an image says."""

    height: int
    width: int
    frames: int = 0
    """Number of frames or pages, if there are several and none was chosen; else 0."""


class LazyImage(Protocol):
    """An image that is made when it is opened, such as an augmented one."""

    def size(self) -> tuple[int, int]:
        """Return the (height, width) of the image that `open` returns."""

    def open(self) -> PILImage.Image:
        """Return the RGB image."""


def resolve_path(value: Any, media_root: str | Path | None) -> Any:
    """Join a relative path to the media root, as a `MediaPath`; return any other value unchanged.

    Raises:
        OutsideRootError: the path leads out of the root, and the root does not allow that.
    """
    if not isinstance(value, str) or file_of(value) is None:
        return value
    path = value.removeprefix("file://")
    if media_root is None:
        return path
    joined = os.path.join(media_root, path)  # noqa: PTH118 - a million paths; an absolute one stays as it is
    require_inside(joined, path, media_root)
    return path if os.path.isabs(path) else MediaPath(joined, path, media_root)  # type: ignore[arg-type]  # noqa: PTH117


def unpack_arrow(value: Any) -> Any:
    """Return the bytes or path of ``{"bytes": ..., "path": ...}``, as Arrow stores an image; keep any other value."""
    # str first: it is the usual type, and the check for Mapping is slow
    if not isinstance(value, str) and isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        return value.get("bytes") or value.get("path")
    return value


def open_image(value: Any, policy: MediaPolicy) -> PILImage.Image:
    """Decode an image, apply its EXIF orientation and convert it to RGB, as ``transformers.image_utils.load_image``.

    Raises:
        DataError: the image is missing, damaged, not an image, too large, or a URL that the recipe does not allow.
    """
    if _is_lazy(value):
        return value.open()
    value, reading = chosen_reading(value, policy)
    with opened_image(value, policy, reading) as image:
        if (deep := _deep_pixels(image)) is not None:
            return PILImage.fromarray(to_8_bit(deep, reading, medium_name(value)))
        if image is value:  # the caller's image must not change
            return ImageOps.exif_transpose(image).convert("RGB")
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy costs a tenth of a decode


def image_size(value: Any, policy: MediaPolicy) -> tuple[int, int]:
    """Return the (height, width) that `open_image` would give, as `image_header` does."""
    header = image_header(value, policy, count_frames=False)
    return header.height, header.width


def image_header(value: Any, policy: MediaPolicy, *, count_frames: bool = True) -> Header:
    """Return what the header of an image says of the picture that `open_image` would give; no pixels are decoded.

    A PNG may store its orientation after the pixels. Its chunk headers are scanned, and the file is decoded only if
    there is such a chunk.

    Raises:
        DataError: as in `open_image`, for errors that the header reveals.
    """
    if isinstance(value, str) and value.lower().endswith((".jpg", ".jpeg")) and not policy.reading.image_frame:
        size = jpeg_size(value)
        if size is not None and size[0] * size[1] <= policy.max_image_pixels:
            return Header(*size)
    if _is_lazy(value):
        stored = chosen_reading(value, policy)[0]
        if not count_frames or stored is value or _is_lazy(stored):
            return Header(*value.size())
        return Header(*value.size(), image_header(*_as_read(value, policy)).frames)
    if isinstance(value, ReadAs):
        return image_header(*_as_read(value, policy), count_frames=count_frames)
    reading = policy.reading
    with opened_image(value, policy, reading) as image:
        frames = unchosen_of(image, reading) if count_frames else 0
        _refuse_unconvertible(image, reading, medium_name(value))
        if isinstance(image, MedicalFile):
            return Header(image.size[1], image.size[0], frames)
        if (image.format == "PNG" and _has_late_text(image)) or image.format not in (*MEASURED, None):
            image.load()
        width, height = image.size
        tags: Any = getattr(image, "tag_v2", {})
        if image.format == "TIFF" and ORIENTATION in tags:  # PIL reports the upright size of such a TIFF
            return Header(height, width, frames)
        # PngImageFile.getexif would decode the pixels first
        orientation = PILImage.Image.getexif(image).get(ORIENTATION, 1)
        return Header(width, height, frames) if orientation in TURNED else Header(height, width, frames)


def unchosen_of(image: PILImage.Image | MedicalFile, reading: Reading) -> int:
    """Return the number of frames of an opened image that has several of which none was chosen; else 0."""
    if reading.image_frame is not None or image.format not in SEVERAL:
        return 0
    count = int(getattr(image, "n_frames", 1))
    return count if count > 1 else 0


def stored_mode(value: Any, policy: MediaPolicy) -> tuple[str, str]:
    """Return what an image file holds: PIL's mode of its colours, and the deep mode (empty for 8 bits).

    Raises:
        DataError: as in `open_image`, for errors that the header reveals.
    """
    value, reading = chosen_reading(value, policy)
    if _is_lazy(value):  # one that a user's code makes
        return "", ""
    with opened_image(value, policy, reading) as image:
        deep = image.mode * image.is_deep if isinstance(image, MedicalFile) else deep_mode(image)
        return image.mode, deep


def deep_image(value: Any, policy: MediaPolicy) -> tuple[DeepPixels, Reading] | None:
    """Return the values of an image deeper than 8 bits, and how they are converted; None for any other image.

    Raises:
        DataError: it cannot be opened.
    """
    value, reading = chosen_reading(value, policy)
    if _is_lazy(value):  # one that a user's code makes
        return None
    with opened_image(value, policy, reading) as image:
        deep = _deep_pixels(image)
    return None if deep is None or deep.values.dtype == np.uint8 else (deep, reading)


def chosen_reading(value: Any, policy: MediaPolicy) -> tuple[Any, Reading]:
    """Return the value of an image's file, without settings and augmentation, and the settings that apply to it."""
    while _is_lazy(value) and hasattr(value, "value"):
        value = value.value
    if isinstance(value, ReadAs):
        return value.value, value.reading.over(policy.reading)
    return value, policy.reading


def _as_read(value: Any, policy: MediaPolicy) -> tuple[Any, MediaPolicy]:
    """Return the value of an image's file, and the policy with the settings that apply to it."""
    stored, reading = chosen_reading(value, policy)
    return stored, replace(policy, reading=reading)


def _deep_pixels(image: PILImage.Image | MedicalFile) -> DeepPixels | None:
    """Return the values of an image that Pillow cannot read with all its bits; None for any other image."""
    if isinstance(image, MedicalFile):
        return image.pixels()
    mode = deep_mode(image)
    return deep_pixels(image, mode) if mode else None


def _refuse_unconvertible(image: PILImage.Image | MedicalFile, reading: Reading, name: str) -> None:
    """Raise HighBitDepthError, with the values found, if `to_8_bit` would; else decode nothing."""
    if not (reading.high_bit_depth == ERROR or lacks_window(reading)):
        return
    if isinstance(image, MedicalFile) and lacks_window(reading) and image.window() is not None:
        return
    if (deep := _deep_pixels(image)) is not None:
        to_8_bit(deep, reading, name)


def _is_lazy(value: Any) -> TypeGuard[LazyImage]:
    return hasattr(value, "open") and hasattr(value, "size") and callable(value.size)


def _has_late_text(image: PILImage.Image) -> bool:
    """Return True if a PNG has a chunk after its pixels that could hold an orientation."""
    file: Any = getattr(image, "fp", None)
    if file is None:
        return False
    place = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            seen_pixels = seen_pixels or kind == b"IDAT"
            if seen_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)
