"""Open images as the official processing does, and read their size from the header alone.

An image's value is an absolute path, a ``data:`` URI or plain base64, an allowed URL, bytes, a PIL image, or a
`LazyImage`.
"""

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage

from qwenvl_ft.data.media.elsewhere import MediaPath, absent
from qwenvl_ft.data.media.jpeg import jpeg_size
from qwenvl_ft.data.media.refused import require_area
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.recipe.schema import DataConfig

ORIENTATION = ExifTags.Base.Orientation
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
MEASURED = {"JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA"}
"""Formats whose header holds the size of the decoded image; images of other formats are decoded to be measured."""
BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""First characters of JPEG, PNG, GIF and WebP files in base64. A path may begin with them too, but has a dot."""
URL_TIMEOUT_SECONDS = 30.0

PILImage.MAX_IMAGE_PIXELS = None  # replaced by MediaPolicy.max_image_pixels, which raises instead of warning


class LazyImage(Protocol):
    """An image that is made when it is opened, such as an augmented one."""

    def size(self) -> tuple[int, int]:
        """Return the (height, width) of the image that `open` returns."""

    def open(self) -> PILImage.Image:
        """Return the RGB image."""


@dataclass(frozen=True)
class MediaPolicy:
    """Limits on opening media."""

    allow_urls: bool = False
    """Fetch images from http(s) URLs."""
    max_image_pixels: int = 200_000_000
    """Largest stored image, in pixels; protects against decompression bombs."""
    image_timeout: float = 60.0
    """Time limit for decoding the images of one sample, in seconds."""
    video_timeout: float = 60.0
    """Time limit for opening or decoding one video file, in seconds."""

    @classmethod
    def of(cls, data: DataConfig) -> "MediaPolicy":
        """Take the limits from a recipe's ``data`` section."""
        return cls(data.allow_urls, data.max_image_pixels, data.image_timeout, data.video_timeout)


def resolve_path(value: Any, media_root: str | Path | None) -> Any:
    """Join a relative path to the media root, as a `MediaPath`; return any other value unchanged."""
    if not isinstance(value, str) or file_of(value) is None:
        return value
    path = value.removeprefix("file://")
    if media_root is None or os.path.isabs(path):  # noqa: PTH117 - a million paths
        return path
    return MediaPath(os.path.join(media_root, path), path, media_root)  # type: ignore[arg-type]  # noqa: PTH118


def file_of(value: Any) -> str | None:
    """Return the path of a medium's file; None for bytes, URLs and base64."""
    if callable(getattr(value, "open", None)):
        value = getattr(value, "value", None)
    if not isinstance(value, (str, Path)):
        return None
    text = str(value)
    return None if text.startswith(("http://", "https://", "data:")) or _is_base64(text) else text


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
    with _opened(value, policy) as image:
        if image is value:  # the caller's image must not change
            return ImageOps.exif_transpose(image).convert("RGB")
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy costs a tenth of a decode


def image_size(value: Any, policy: MediaPolicy) -> tuple[int, int]:
    """Return the (height, width) that `open_image` would give, from the header, without decoding pixels.

    A PNG may store its orientation after the pixels. Its chunk headers are scanned, and the file is decoded only if
    there is such a chunk.

    Raises:
        DataError: as in `open_image`, for errors that the header reveals.
    """
    if _is_lazy(value):
        return value.size()
    if isinstance(value, str) and value.lower().endswith((".jpg", ".jpeg")):
        size = jpeg_size(value)
        if size is not None and size[0] * size[1] <= policy.max_image_pixels:
            return size
    with _opened(value, policy) as image:
        if (image.format == "PNG" and _has_late_text(image)) or image.format not in (*MEASURED, None):
            image.load()
        width, height = image.size
        tags: Any = getattr(image, "tag_v2", {})
        if image.format == "TIFF" and ORIENTATION in tags:  # PIL reports the upright size of such a TIFF
            return height, width
        # PngImageFile.getexif would decode the pixels first
        orientation = PILImage.Image.getexif(image).get(ORIENTATION, 1)
        return (width, height) if orientation in TURNED else (height, width)


def _is_lazy(value: Any) -> TypeGuard[LazyImage]:
    return hasattr(value, "open") and hasattr(value, "size") and callable(value.size)


@contextmanager
def _opened(value: Any, policy: MediaPolicy) -> Iterator[PILImage.Image]:
    """Open the image and read its header; every failure, also in the body, becomes a DataError that names the image."""
    name = medium_name(value)
    source = None if isinstance(value, PILImage.Image) else _source(value, name, policy)
    try:
        if source is None:
            _check_area(value, name, policy)
            yield value
        else:
            if isinstance(source, str) and _may_block(source):
                raise DataError(f"image {name} is a pipe or a device. Give a file.")
            with PILImage.open(source) as image:
                _check_area(image, name, policy)
                yield image
    except (DataError, MemoryError, AssertionError):
        raise
    except FileNotFoundError:
        raise DataError(absent("image", value)) from None
    except IsADirectoryError:
        raise DataError(f"image {name} is a folder.") from None
    except UnidentifiedImageError:
        raise DataError(f"image {name} is not an image that can be read ({_size_on_disk(source)}).") from None
    except Exception as error:  # decoders raise struct.error, TypeError and others
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"image {name} cannot be opened: {error.strerror}.") from None
        raise DataError(f"image {name} is damaged: {one_line(error)}. Replace the file or drop the record.") from None


def _source(value: Any, name: str, policy: MediaPolicy) -> Any:
    """Return the path or buffer that PIL opens."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value)
    if not isinstance(value, (str, Path)):
        raise DataError(f"image {name} is a {type(value).__name__}. Give a path, bytes, a data: URI or a PIL image.")
    text = str(value)
    if text.startswith(("http://", "https://")):
        return io.BytesIO(_fetch(text, policy))
    if text.startswith("data:") or _is_base64(text):
        try:
            return io.BytesIO(base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True))
        except binascii.Error as error:
            raise DataError(f"image {name} is not valid base64: {error}.") from None
    return text


def _may_block(path: str) -> bool:
    """Return True for pipes and devices, where opening may wait for a writer."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - runs for every image
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _is_base64(text: str) -> bool:
    return text.startswith(BASE64_HEADS) and "." not in text


def _fetch(url: str, policy: MediaPolicy) -> bytes:
    if not policy.allow_urls:
        raise DataError(f"image {url} is a URL. Download it, or set data.allow_urls=true.")
    import httpx

    try:
        answer = httpx.get(url, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError(f"image {url} cannot be fetched: {error}.") from None
    return answer.content


def _check_area(image: PILImage.Image, name: str, policy: MediaPolicy) -> None:
    width, height = image.size
    require_area(f"image {name}", width, height, policy.max_image_pixels)


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


def medium_name(value: Any) -> str:
    """Return the name of a medium for messages: its path, or a description of its value."""
    if _is_lazy(value):
        value = getattr(value, "value", "made when opened")
    if isinstance(value, PILImage.Image):
        return getattr(value, "filename", "") or "given as a PIL image"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"of {len(value)} bytes"
    if isinstance(value, (list, tuple)):
        return f"of {len(value)} frames"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:40]}..."


def _size_on_disk(source: Any) -> str:
    size = source.getbuffer().nbytes if isinstance(source, io.BytesIO) else Path(source).stat().st_size
    return f"{size} bytes"
