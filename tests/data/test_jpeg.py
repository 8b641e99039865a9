"""The fast JPEG parser agrees with PIL, and leaves to PIL what it does not support."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.data.media.jpeg import _size, jpeg_size
from qwenvl_ft.errors import DataError

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


PLAIN = {
    "baseline": {},
    "progressive": {"progressive": True},
    "best": {"quality": 95, "subsampling": 0, "optimize": True},
    "comment": {"comment": b"\xff\xc0 is written here"},
    "colour profile": {"icc_profile": PROFILE},
    "restarts": {"restart_marker_rows": 1},
    "resolution": {"dpi": (300, 300)},
}
LEFT_TO_PIL = {
    "upright": {"exif": exif(1)},
    "turned": {"exif": exif(6)},
    "long profile": {"icc_profile": PROFILE * 20},
}


def jpeg(mode="RGB", size=(70, 30), **options):
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_file_is_read_without_pil(tmp_path, monkeypatch, mode, name):
    path = tmp_path / "a.JPG"
    path.write_bytes(jpeg(mode, **PLAIN[name]))
    with Image.open(path) as image:
        expected = image.size[::-1]
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("PIL was asked"))
    assert image_size(str(path), MediaPolicy()) == jpeg_size(str(path)) == expected == (30, 70)


@pytest.mark.parametrize("name", [*LEFT_TO_PIL, "four colours"])
def test_anything_else_is_left_to_pil(tmp_path, name):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg("CMYK") if name == "four colours" else jpeg(**LEFT_TO_PIL[name]))
    assert jpeg_size(str(path)) is None
    assert image_size(str(path), MediaPolicy()) == ((70, 30) if name == "turned" else (30, 70))


def test_what_is_no_jpeg_is_left_to_pil(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (7, 5)).save(path, "PNG")
    assert jpeg_size(str(path)) is None
    assert image_size(str(path), MediaPolicy()) == (5, 7)
    assert jpeg_size(str(tmp_path / "none.jpg")) is None
    with pytest.raises(DataError, match="does not exist"):
        image_size(str(tmp_path / "none.jpg"), MediaPolicy())
    with pytest.raises(DataError, match="is a URL"):
        image_size("https://example.org/a.jpg", MediaPolicy())


def test_a_plain_file_may_be_too_large(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    with pytest.raises(DataError, match=r"above data\.max_image_pixels=2099"):
        image_size(str(path), MediaPolicy(max_image_pixels=30 * 70 - 1))


def opened(data):
    """Return PIL's (height, width); None if PIL cannot open the file, or would rotate it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return None if image.getexif().get(0x0112, 1) != 1 or image.format != "JPEG" else image.size[::-1]
    except Exception:  # decoders raise struct.error and others
        return None


def test_a_damaged_header_never_gives_another_size_than_pil():
    """With bytes changed, deleted and inserted, every answer is PIL's answer or None."""
    rng = np.random.default_rng(0)
    answered, refused = 0, 0
    for options in PLAIN.values():
        whole = jpeg(**options)
        header = whole.index(b"\xff\xda") + 16
        for _ in range(400):
            data, place = bytearray(whole), int(rng.integers(2, header))
            kind = rng.integers(4)
            if kind == 0:
                data[place] = rng.integers(256)
            elif kind == 1:
                del data[place]
            elif kind == 2:
                data.insert(place, int(rng.choice([0xFF, 0, 0xC0, 0xE1])))
            else:
                del data[place:]
            found = _size(bytes(data[:8192]))
            answered += found is not None
            refused += found is None
            assert found is None or found == opened(bytes(data)), (options, kind, place)
    assert answered > 500
    assert refused > 500, "vacuous: nothing was damaged"
