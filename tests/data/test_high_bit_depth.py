"""Values deeper than 8 bits become 8 bits as the settings say, by the formula that is computed here with integers."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.high_bit_depth import HighBitDepthError
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.data.media.reading import Reading
from qwenvl_ft.errors import DataError

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 4096, (21, 37)).astype(np.uint16)


def by_hand(values, low, high):
    """The documented formula in exact integers: halves are rounded up."""
    low, high = int(low), int(high)
    raised = np.clip(values.astype(object), low, high) - low
    return np.asarray((2 * 255 * raised + (high - low)) // (2 * (high - low))).astype(np.uint8)


def policy(method="error", window=None, frame=None):
    return MediaPolicy(reading=Reading(method, window, frame))


def png(values):
    """Return a PNG of 16 bits with 1 (grey), 2 (grey, alpha), 3 or 4 channels, written byte by byte."""
    high, wide, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", wide, high, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(*pages, order="<", orientation=1, planar=False):
    """Return an uncompressed TIFF with pages of 16 bits with 3 or 4 channels; ``planar`` stores them one by one."""
    file = bytearray(b"II*\0" if order == "<" else b"MM\0*") + bytes(4)
    link = 4  # where the place of the next page is written
    for values in pages:
        high, wide, channels = values.shape
        layers = [values[..., k] for k in range(channels)] if planar else [values]
        places, sizes = [], []
        for layer in layers:
            body = layer.astype(f"{order}u2").tobytes()
            places.append(len(file))
            sizes.append(len(body))
            file += body
        tags = {256: (4, [wide]), 257: (4, [high]), 258: (3, [16] * channels), 259: (3, [1]), 262: (3, [2])}
        tags |= {273: (4, places), 274: (3, [orientation]), 277: (3, [channels]), 278: (4, [high]), 279: (4, sizes)}
        tags |= {284: (3, [2 if planar else 1])} | ({338: (3, [2])} if channels == 4 else {})
        entries = b""
        for tag, (kind, numbers) in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(numbers)}{'HI'[kind - 3]}", *numbers)
            if len(packed) > 4:
                packed, at = struct.pack(f"{order}I", len(file)), packed
                file += at
            entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
        file[link : link + 4] = struct.pack(f"{order}I", len(file))
        file += struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
        link = len(file) - 4
    return bytes(file)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SIGNED = RNG.integers(-1024, 3072, (21, 37)).astype(np.int32)
COLOUR = RNG.integers(0, 65536, (21, 37, 4)).astype(np.uint16)
FILES = {
    "16-bit grey PNG": (png(GREY[..., None]), GREY),
    "16-bit grey TIFF": (saved(Image.fromarray(GREY), "TIFF"), GREY),
    "big-endian TIFF": (
        saved(Image.frombytes("I;16B", (37, 21), GREY.astype(">u2").tobytes()), "TIFF"),
        GREY,
    ),
    "signed 32-bit TIFF": (saved(Image.fromarray(SIGNED), "TIFF"), SIGNED),
    "float TIFF": (saved(Image.fromarray(SIGNED.astype(np.float32)), "TIFF"), SIGNED),
    "16-bit JPEG 2000": (saved(Image.fromarray(GREY), "JPEG2000"), GREY),
    "16-bit grey PNG with alpha": (png(COLOUR[..., :2]), COLOUR[..., 0]),
    "48-bit PNG": (png(COLOUR[..., :3]), COLOUR[..., :3]),
    "64-bit PNG with alpha": (png(COLOUR), COLOUR[..., :3]),
    "48-bit TIFF": (tiff(COLOUR[..., :3]), COLOUR[..., :3]),
    "48-bit big-endian TIFF": (tiff(COLOUR[..., :3], order=">"), COLOUR[..., :3]),
    "64-bit TIFF with alpha": (tiff(COLOUR), COLOUR[..., :3]),
    "48-bit TIFF in planes": (tiff(COLOUR[..., :3], planar=True), COLOUR[..., :3]),
    "64-bit big-endian TIFF in planes": (tiff(COLOUR, order=">", planar=True), COLOUR[..., :3]),
    "48-bit PPM": (b"P6 37 21 65535\n" + COLOUR[..., :3].astype(">u2").tobytes(), COLOUR[..., :3]),
}
"""Name -> the file, and its values without alpha."""


def three(values):
    return np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values


@pytest.mark.parametrize("as_path", [True, False], ids=["path", "bytes"])
@pytest.mark.parametrize("name", FILES)
def test_every_deep_file_is_converted_by_the_documented_formula(tmp_path, name, as_path):
    data, values = FILES[name]
    value = tmp_path / "image.bin"
    value.write_bytes(data)
    value = str(value) if as_path else data
    low, high = int(values.min()), int(values.max())
    for setting, limits in (
        (policy("window", (-160.0, 240.0)), (-160, 240)),
        (policy("window", (100.0, 3000.0)), (100, 3000)),
        (policy("minmax"), (low, high)),
        (policy("clip"), (0, 255)),
    ):
        shown = np.asarray(open_image(value, setting))
        assert np.array_equal(shown, three(by_hand(values, *limits))), setting
        assert image_size(value, setting) == values.shape[:2]
    assert len(np.unique(np.asarray(open_image(value, policy("minmax"))))) > 100, "vacuous: a flat picture"


@pytest.mark.parametrize("name", FILES)
def test_by_default_a_deep_file_is_an_error_that_says_the_range_and_the_settings(name):
    data, values = FILES[name]
    for ask in (open_image, image_size):
        with pytest.raises(HighBitDepthError) as error:
            ask(data, MediaPolicy())
        assert f"found {values.min():g} to {values.max():g}" in str(error.value)
        assert "Set data.high_bit_depth to window (with data.window=[low,high]), minmax, percentile or clip" in str(
            error.value
        )


def test_percentile_cuts_half_a_percent_at_each_end():
    values = RNG.permutation(np.arange(10001, dtype=np.int32)).reshape(73, 137)
    shown = np.asarray(open_image(saved(Image.fromarray(values), "TIFF"), policy("percentile")))
    assert np.array_equal(shown[..., 0], by_hand(values, 50, 9950))  # 0.5% and 99.5% of 0...10000
    mostly_flat = np.where(np.arange(10001).reshape(73, 137) < 3, 500, 7).astype(np.int32)
    shown = np.asarray(open_image(saved(Image.fromarray(mostly_flat), "TIFF"), policy("percentile")))
    assert np.unique(shown).tolist() == [0, 255], "equal percentiles fall back to the smallest and largest value"


def test_float_values_that_are_not_finite_do_not_spoil_the_range():
    values = np.array([[0.0, 0.25, 1.0], [np.nan, np.inf, -np.inf]], dtype=np.float32)
    shown = np.asarray(open_image(saved(Image.fromarray(values), "TIFF"), policy("minmax")))
    assert shown[..., 0].tolist() == [[0, 64, 255], [0, 255, 0]]


def test_an_image_of_one_value_becomes_black():
    flat = saved(Image.fromarray(np.full((4, 5), 900, dtype=np.uint16)), "PNG")
    for method in ("minmax", "percentile"):
        assert not np.asarray(open_image(flat, policy(method))).any()


def test_a_large_image_goes_through_a_table_with_the_same_result():
    values = RNG.integers(0, 65536, (300, 301)).astype(np.uint16)
    assert values.size > 2**16
    shown = np.asarray(open_image(saved(Image.fromarray(values), "PNG"), policy("window", (-7.0, 51234.0))))
    assert np.array_equal(shown[..., 0], by_hand(values, -7, 51234))


@pytest.mark.parametrize("kind", ["8-bit grey", "16-bit grey", "48-bit colour"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_any_depth_is_turned_by_its_orientation(tmp_path, suffix, orientation, kind):
    small = RNG.integers(0, 256, (24, 40)).astype(np.uint8)
    exif, path = Image.Exif(), tmp_path / f"x{suffix}"
    exif[0x0112] = orientation
    colour = np.repeat(small[..., None], 3, axis=-1)
    if kind == "8-bit grey":
        Image.fromarray(small).save(path, exif=exif)
    elif kind == "16-bit grey":
        Image.fromarray(small.astype(np.uint16)).save(path, exif=exif)
    elif suffix == ".png":
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        path.write_bytes(png(colour)[:33] + chunk + png(colour)[33:])
    else:
        path.write_bytes(tiff(colour, orientation=orientation))
    twin = Image.fromarray(small)
    twin.getexif()[0x0112] = orientation
    shown = open_image(str(path), policy("clip"))
    assert np.array_equal(np.asarray(shown), three(np.asarray(ImageOps.exif_transpose(twin))))
    assert image_size(str(path), policy("clip")) == (shown.height, shown.width)
    assert (shown.width == 24) == (orientation >= 5), "vacuous: nothing was turned"


def test_images_of_8_bits_are_read_as_before_whatever_the_setting(tmp_path):
    picture = Image.fromarray(RNG.integers(0, 200, (21, 37, 3)).astype(np.uint8))
    for kind in ("PNG", "TIFF", "JPEG", "JPEG2000", "PPM", "WEBP"):
        data = saved(picture, kind)
        plain = np.asarray(open_image(data, MediaPolicy()))
        for method in ("window", "minmax", "percentile", "clip"):
            assert np.array_equal(np.asarray(open_image(data, policy(method, (0.0, 9.0)))), plain)


def test_a_window_without_numbers_is_an_error_that_asks_for_them():
    with pytest.raises(HighBitDepthError, match=r"and no window\. Set data\.window=\[low,high\]"):
        image_size(FILES["16-bit grey PNG"][0], policy("window"))


def test_a_callers_deep_pil_image_is_converted_and_not_changed():
    image = Image.fromarray(GREY)
    assert np.array_equal(
        np.asarray(open_image(image, policy("minmax")))[..., 0], by_hand(GREY, GREY.min(), GREY.max())
    )
    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), GREY)


def test_the_encoder_sees_the_window_and_its_length_cache_does_not(processor):
    record = {
        "image": [FILES["16-bit grey PNG"][0]],
        "conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}],
    }
    narrow, wide = (Encoder(processor, policy=policy("window", (0.0, high))) for high in (99.0, 4095.0))
    first, second = narrow(record), wide(record)
    assert not np.array_equal(first["pixel_values"], second["pixel_values"])
    picture = Image.fromarray(three(by_hand(GREY, 0, 4095)))
    assert np.array_equal(second["pixel_values"], Encoder(processor)(record | {"image": [picture]})["pixel_values"])
    assert narrow.fingerprint() == wide.fingerprint() != Encoder(processor, policy=policy()).fingerprint()
    frames = Encoder(processor, policy=policy("window", (0.0, 99.0), 1))
    assert frames.fingerprint() != wide.fingerprint(), "pages may differ in size"


def test_a_page_of_a_tiff_is_chosen_by_its_number():
    pages = [Image.fromarray(np.full((8 + k, 9), 1000 * (k + 1), dtype=np.uint16)) for k in range(3)]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for k in range(3):
        chosen = policy("window", (0.0, 65535.0), k)
        assert image_size(data, chosen) == (8 + k, 9)
        assert np.unique(np.asarray(open_image(data, chosen))).tolist() == [by_hand(np.array(1000 * (k + 1)), 0, 65535)]
    with pytest.raises(DataError, match="has no frame image_frame=3: it has 3, counted from 0"):
        image_size(data, policy("clip", None, 3))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("as_path", [True, False], ids=["path", "bytes"])
def test_a_page_of_a_48_bit_tiff_is_chosen(tmp_path, as_path, order):
    pages = [COLOUR[..., :3], COLOUR[::-1, :30, :3] // 3, COLOUR[:9, :11, 1:]]
    data = tiff(*pages, order=order)
    (tmp_path / "a.tif").write_bytes(data)
    for k, values in enumerate(pages):
        shown = open_image(str(tmp_path / "a.tif") if as_path else data, policy("window", (0.0, 65535.0), k))
        assert np.array_equal(np.asarray(shown), by_hand(values, 0, 65535))


def test_a_deep_file_that_ends_too_early_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"its RGB;16B values are damaged .*Save it as a 16-bit PNG, or drop the rec"):
        open_image(png(COLOUR[..., :3])[:-60], policy("minmax"))


def test_a_frame_of_an_8_bit_gif_is_chosen_and_a_callers_image_goes_back_to_its_own():
    frames = [Image.fromarray(np.full((6, 5), 40 * k, dtype=np.uint8)) for k in range(4)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.unique(np.asarray(open_image(data, policy("error", None, 2)))).tolist() == [80]
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert np.unique(np.asarray(open_image(image, policy("error", None, 3)))).tolist() == [120]
    assert image.tell() == 1
