"""Open images as the official processing does, and know their size from the header alone.

An image's value is an absolute path, a ``data:`` URI or bare base64, an allowed URL, bytes, a PIL image, or any object
with ``size()`` -> (height, width) and ``open()`` -> PIL image.
"""

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage

from qwenvl_ft.data.media.jpeg import jpeg_size
from qwenvl_ft.errors import DataError, one_line

ORIENTATION = ExifTags.Base.Orientation
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
MEASURED = {"JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA"}
"""Formats whose header tells the size that decoding gives; any other is decoded to be measured."""
BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How JPEG, PNG, GIF and WebP begin in base64; no file name does so without a dot."""
URL_TIMEOUT_SECONDS = 30.0

PILImage.MAX_IMAGE_PIXELS = None  # ours is MediaPolicy.max_image_pixels, an error instead of a warning


@dataclass(frozen=True)
class MediaPolicy:
    """What may be opened."""

    allow_urls: bool = False
    """Fetch http(s) images while training."""
    max_image_pixels: int = 200_000_000
    """Largest stored image, in pixels; protects against decompression bombs."""
    image_timeout: float = 60.0
    """Seconds that decoding the images of one sample may take."""
    video_timeout: float = 60.0
    """Seconds that opening or decoding one video file may take."""

    @classmethod
    def of(cls, data: Any) -> "MediaPolicy":
        """The rules of a recipe's ``data`` section."""
        return cls(data.allow_urls, data.max_image_pixels, data.image_timeout, data.video_timeout)


def resolve_path(value: Any, media_root: str | Path | None) -> Any:
    """A relative path against the media root; anything else as it is."""
    if not isinstance(value, str) or file_of(value) is None:
        return value
    path = value.removeprefix("file://")
    return path if media_root is None or os.path.isabs(path) else os.path.join(media_root, path)  # noqa: PTH117, PTH118


def file_of(value: Any) -> str | None:
    """The path that a medium's value is, or is made from; None of bytes, URLs and base64."""
    if callable(getattr(value, "open", None)):
        value = getattr(value, "value", None)
    if not isinstance(value, (str, Path)):
        return None
    text = str(value)
    return None if text.startswith(("http://", "https://", "data:")) or _is_base64(text) else text


def open_image(value: Any, policy: MediaPolicy) -> PILImage.Image:
    """Decode an image: EXIF orientation applied, converted to RGB, as ``transformers.image_utils.load_image``.

    Raises:
        DataError: missing, damaged, not an image, too large, or a URL that the recipe does not allow.
    """
    if hasattr(value, "open") and hasattr(value, "size") and callable(value.size):
        return value.open()
    with _opened(value, policy) as image:
        if image is value:  # the caller's own stays as it is
            return ImageOps.exif_transpose(image).convert("RGB")
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # each spared copy is a tenth of a decode


def image_size(value: Any, policy: MediaPolicy) -> tuple[int, int]:
    """(height, width) of what `open_image` would return; reads the header, decodes no pixel.

    A PNG may carry its orientation behind the pixels. Its chunk headers are walked, and only if there is such a chunk
    is the file decoded.

    Raises:
        DataError: as `open_image`, as far as the header shows it.
    """
    if hasattr(value, "open") and hasattr(value, "size") and callable(value.size):
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
        if image.format == "TIFF" and ORIENTATION in tags:  # PIL's size of such a TIFF is the upright one already
            return height, width
        # PngImageFile.getexif would decode the pixels first
        orientation = PILImage.Image.getexif(image).get(ORIENTATION, 1)
        return (width, height) if orientation in TURNED else (height, width)


@contextmanager
def _opened(value: Any, policy: MediaPolicy) -> Iterator[PILImage.Image]:
    """The image, its header read; all that can go wrong becomes a DataError with the value's name."""
    name = medium_name(value)
    source = None if isinstance(value, PILImage.Image) else _source(value, name, policy)
    try:
        if source is None:
            _check_area(value, name, policy)
            yield value
        else:
            if isinstance(source, str) and _waits(source):
                raise DataError(f"image {name} is a pipe or a device. Give a file.")
            with PILImage.open(source) as image:
                _check_area(image, name, policy)
                yield image
    except (DataError, MemoryError, AssertionError):
        raise
    except FileNotFoundError:
        raise DataError(f"image {name} does not exist. Relative paths start at data.media_root.") from None
    except IsADirectoryError:
        raise DataError(f"image {name} is a folder.") from None
    except UnidentifiedImageError:
        raise DataError(f"image {name} is not an image that can be read ({_size_on_disk(source)}).") from None
    except Exception as error:  # of any type: decoders let struct.error, TypeError and others through
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"image {name} cannot be opened: {error.strerror}.") from None
        told = one_line(error)
        raise DataError(f"image {name} is damaged: {told}. Replace the file or drop the record.") from None


def _source(value: Any, name: str, policy: MediaPolicy) -> Any:
    """What PIL opens: a path or a buffer."""
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


def _waits(path: str) -> bool:
    """Whether opening it could wait for somebody who writes."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - for each image
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
    if width * height > policy.max_image_pixels:
        raise DataError(
            f"image {name} has {width} x {height} = {width * height} pixels, above data.max_image_pixels="
            f"{policy.max_image_pixels}. Shrink the file or raise the limit."
        )


def _has_late_text(image: PILImage.Image) -> bool:
    """Whether a PNG has a chunk behind its pixels that could hold an orientation."""
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
    """How messages call a value."""
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
