"""Which image files hold more than 8 bits per value, and what are the values?

Pillow opens grey images of 16 and 32 bits with all their bits. It opens deeper colours and grey with alpha as 8 bits
and drops the rest without a word; only the raw mode of its decoder says so. Those files are decoded by PyAV (FFmpeg).
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from qwenvl_ft.data.media.high_bit_depth import DeepPixels, UnsupportedError

DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
"""Pillow's modes of more than 8 bits."""
REDUCED = {"PNG": "png_pipe", "TIFF": "tiff_pipe", "PPM": "ppm_pipe", "SGI": "sgi_pipe", "JPEG2000": "j2k_pipe"}
"""Formats of which Pillow opens deeper values as 8 bits -> FFmpeg's names."""
HEAD = 65536
"""Bytes of a JPEG 2000 file in which its size segment is searched."""
PACKED = {"gray16": 1, "ya16": 2, "rgb48": 3, "rgba64": 4}
"""FFmpeg's formats of 16 bits in one plane -> values per pixel; the name is followed by le or be."""
PLANAR = {"gbrp16": 3, "gbrap16": 4}
"""The same for formats of one plane per colour: green, blue, red, alpha."""
ALPHA = (2, 4)
ADVICE = "Save it as a 16-bit PNG, or drop the record."


def deep_mode(image: PILImage.Image) -> str:
    """Return what a file of more than 8 bits per value holds, such as ``I;16`` or ``RGB;16B``; empty for 8 bits."""
    if image.mode in DEEP_MODES:
        return image.mode
    return _reduced_mode(image) if image.format in REDUCED else ""


def _reduced_mode(image: Any) -> str:
    """Return the raw mode of a file that Pillow reduces to 8 bits; empty if it does not reduce it."""
    if not image.tile:  # already decoded
        return ""
    arguments = image.tile[0][3]
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if image.format == "PPM":
        scales = image.tile[0][0] in ("ppm", "ppm_plain")  # those decoders know the largest value
        return f"{raw};16B" if scales and arguments[1] > 255 else ""
    if image.format == "JPEG2000":
        bits = _jpeg2000_bits(image.fp)
        return f"{image.mode};{bits}" if bits > 8 else ""
    if image.format == "TIFF" and ";16" not in raw:  # Pillow reads separate planes of 16 bits as if they had 8
        bits = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,)))
        return f"{image.mode};{bits}" if bits > 8 else ""
    return raw if isinstance(raw, str) and ";16" in raw else ""


def _jpeg2000_bits(file: Any) -> int:
    """Return the bits per value of the first channel: byte 40 of the size segment, which begins the code stream."""
    place = file.tell()
    file.seek(0)
    head = file.read(HEAD)
    file.seek(place)
    start = head.find(b"\xff\x4f\xff\x51")
    return (head[start + 42] & 0x7F) + 1 if 0 <= start < len(head) - 42 else 8


def deep_pixels(image: PILImage.Image, mode: str) -> DeepPixels:
    """Decode the current frame of a file with `deep_mode`, upright by its EXIF orientation.

    Raises:
        UnsupportedError: PyAV is missing, or does not decode it.
    """
    if image.mode not in DEEP_MODES:
        orientation = PILImage.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return DeepPixels(upright(_decoded(image, mode), orientation), mode)
    values = np.asarray(ImageOps.exif_transpose(image))
    return DeepPixels(values.astype(values.dtype.newbyteorder("="), copy=False), mode)


def upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn [H, W, ...] by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.flip(values, flips.get(orientation, ()))


def _decoded(image: Any, mode: str) -> NDArray[np.uint16]:
    """Decode colours, or grey with alpha, of 16 bits: uint16[H, W] or uint16[H, W, 3]."""
    try:
        import av
    except ImportError:
        raise UnsupportedError(f"images of mode {mode} need PyAV: pip install 'qwenvl_ft[video]'.") from None
    try:
        with av.open(_current_page(image), format=REDUCED[image.format]) as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, StopIteration):
        raise UnsupportedError(f"its {mode} values are damaged or of an unknown kind. {ADVICE}") from None
    kind, order = frame.format.name[:-2], frame.format.name[-2:]
    count = PACKED.get(kind) or PLANAR.get(kind)
    if count is None or sorted((frame.width, frame.height)) != sorted(image.size):
        raise UnsupportedError(f"its {mode} values cannot be decoded (as {frame.format.name}). {ADVICE}")
    width = frame.width * (1 if kind in PLANAR else count)  # without the padding of rows
    planes = [np.frombuffer(plane, ">u2" if order == "be" else "<u2") for plane in frame.planes]
    rows = [plane.reshape(frame.height, -1)[:, :width].astype(np.uint16) for plane in planes]
    if kind in PLANAR:
        return np.stack([rows[2], rows[0], rows[1]], axis=-1)
    values = rows[0].reshape(frame.height, frame.width, count)
    colours = values[..., : count - 1] if count in ALPHA else values
    return colours[..., 0] if colours.shape[-1] == 1 else colours


def _current_page(image: Any) -> Any:
    """Return a file whose first page is the current one; FFmpeg's own option cannot choose pages of deep colours."""
    image.fp.seek(0)
    if image.format != "TIFF" or image.tell() == 0:
        return image.fp
    data = bytearray(image.fp.read())
    data[4:8] = image.tag_v2.offset.to_bytes(4, "little" if data[:2] == b"II" else "big")  # place of the first page
    return io.BytesIO(data)
