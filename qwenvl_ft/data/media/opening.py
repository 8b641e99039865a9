"""Opens the file of an image, whatever its value is, and turns every failure into one line that names the image."""

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

from qwenvl_ft.data.media.elsewhere import absent
from qwenvl_ft.data.media.high_bit_depth import UnsupportedError
from qwenvl_ft.data.media.medical_files import MedicalFile, is_medical, opened_medical
from qwenvl_ft.data.media.reading import ERROR, REFUSING, ReadAs, Reading, lacks_window, reading_of
from qwenvl_ft.data.media.refused import SKIP, require_area
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS
from qwenvl_ft.recipe.schema import DataConfig

ORIENTATION = ExifTags.Base.Orientation
BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""First characters of JPEG, PNG, GIF and WebP files in base64. A path may begin with them too, but has a dot."""
URL_TIMEOUT_SECONDS = 30.0

PILImage.MAX_IMAGE_PIXELS = None  # replaced by MediaPolicy.max_image_pixels, which raises instead of warning


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
    reading: Reading = REFUSING
    """How images are read that have no settings of their own."""

    @classmethod
    def of(cls, data: DataConfig) -> "MediaPolicy":
        """Take the limits from a recipe's ``data`` section."""
        reading = reading_of({key: getattr(data, key) for key in IMAGE_KEYS}, "data.")
        return cls(data.allow_urls, data.max_image_pixels, data.image_timeout, data.video_timeout, reading)

    def for_sizes(self) -> dict[str, Any]:
        """Return what the sizes of media depend on, for the keys of caches: all but the numbers of a window."""
        reading = self.reading
        if reading.high_bit_depth not in (None, ERROR) and not lacks_window(reading):
            reading = replace(reading, high_bit_depth="any", window=None)
        return asdict(replace(self, reading=reading))


def file_of(value: Any) -> str | None:
    """Return the path of a medium's file; None for bytes, URLs and base64."""
    if not isinstance(value, (str, Path)):
        inner = getattr(value, "value", None)  # of a `ReadAs`, or of a `LazyImage`
        return None if inner is None else file_of(inner)
    text = str(value)
    return None if text.startswith(("http://", "https://", "data:")) or is_base64(text) else text


@contextmanager
def opened_image(value: Any, policy: MediaPolicy, reading: Reading) -> Iterator[Any]:
    """Open the image at its frame and read its header; every failure, also in the body, becomes a DataError that names
    the image, and the frame of a file that has several.

    Yields:
        A PIL image or a `MedicalFile`.
    """
    name, place = medium_name(value), ""
    source = None if isinstance(value, PILImage.Image) else _source(value, name, policy)
    try:
        if source is None:
            _check_area(value, name, policy)
            before = value.tell()
            _seek(value, reading.image_frame, name)
            yield value
            _seek(value, before, name)
        else:
            if isinstance(source, str) and _may_block(source):
                raise DataError(f"image {name} is a pipe or a device. Give a file.")
            with _open_file(source) as image:
                if reading.image_frame is not None:
                    _seek(image, reading.image_frame, name)
                if isinstance(image, MedicalFile):
                    image.require_frame()
                _check_area(image, name, policy)
                try:
                    yield image
                except Exception:
                    place = _place(image)
                    raise
    except (DataError, MemoryError, AssertionError):
        raise
    except UnsupportedError as error:
        raise DataError(f"image {name}{place} cannot be read: {error}") from None
    except FileNotFoundError:
        raise DataError(absent("image", value)) from None
    except IsADirectoryError:
        raise DataError(f"image {name} is a folder.") from None
    except UnidentifiedImageError:
        raise DataError(f"image {name} is not an image that can be read ({_size_on_disk(source)}).") from None
    except Exception as error:  # decoders raise struct.error, TypeError and others
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"image {name} cannot be opened: {error.strerror}.") from None
        raise DataError(f"image {name}{place} is damaged: {one_line(error)}. Replace the file, {SKIP}.") from None


def _open_file(source: Any) -> Any:
    """Open a path or a buffer by PIL, or as a medical file by its name, or by its bytes if PIL does not know it."""
    if is_medical(source):
        return opened_medical(source)
    try:
        image = PILImage.open(source)
    except UnidentifiedImageError:
        if not is_medical(source, by_content=True):
            raise
        return opened_medical(source)
    if image.format == "TIFF" and ORIENTATION in image.tag_v2:  # type: ignore[attr-defined]
        image.filename = ""  # Pillow maps a TIFF with a name into memory, and then confuses its sides
    return image


def _seek(image: PILImage.Image, frame: int | None, name: str) -> None:
    """Move an image to a frame; None leaves it where it is.

    Raises:
        DataError: the image has no such frame.
    """
    if frame is None:
        return
    count = getattr(image, "n_frames", 1)  # before seeking: after a failed seek Pillow counts one too many
    if frame >= count:
        raise DataError(f"image {name} has no frame image_frame={frame}: it has {count}, counted from 0.")
    image.seek(frame)


def _place(image: Any) -> str:
    """Return `` (frame 2 of 5, ...)`` for an open image of several frames; empty for others, or if nothing can tell."""
    try:
        frame, count = image.tell(), getattr(image, "n_frames", 1)
    except Exception:  # decoders raise struct.error, TypeError and others
        return ""
    return f" (frame {frame} of {count}, counted from 0)" if count > 1 else ""


def _source(value: Any, name: str, policy: MediaPolicy) -> Any:
    """Return the path or buffer that PIL opens."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value)
    if not isinstance(value, (str, Path)):
        raise DataError(f"image {name} is a {type(value).__name__}. Give a path, bytes, a data: URI or a PIL image.")
    text = str(value)
    if text.startswith(("http://", "https://")):
        return io.BytesIO(_fetch(text, policy))
    if text.startswith("data:") or is_base64(text):
        try:
            return io.BytesIO(base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True))
        except binascii.Error as error:
            raise DataError(f"image {name} is not valid base64: {error}.") from None
    return text


def _may_block(path: str) -> bool:
    """Return True for pipes and devices, where opening may wait for a writer."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - runs for every image
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_base64(text: str) -> bool:
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


def medium_name(value: Any) -> str:
    """Return the name of a medium for messages: its path, or a description of its value."""
    if isinstance(value, ReadAs):
        return medium_name(value.value)
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
