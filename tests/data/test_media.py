"""Images have the same pixels as in the official processing, and their sizes are read from headers."""

import base64
import io
import os
import struct
import threading
import time
import warnings
import zlib
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from cases import SHARED, picture
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin
from transformers.image_utils import load_image

from qwenvl_ft.data.conversation import Image as ImagePart
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image, resolve_path
from qwenvl_ft.data.media.reading import Reading
from qwenvl_ft.errors import DataError

POLICY = MediaPolicy()
MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr"]
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif", "BMP": ".bmp"}


def saved(image, path, **options):
    """Save an image and return the path, or None if the format does not support the mode."""
    try:
        image.save(path, **options)
    except (OSError, KeyError, ValueError):
        return None
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", FORMATS.values())
def test_every_mode_opens_as_the_official_processing_opens_it(tmp_path, mode, suffix):
    base = picture(37, 21)
    if mode == "I;16":
        image = Image.fromarray(np.arange(37 * 21, dtype=np.uint16).reshape(21, 37) * 80)
    elif mode == "P":
        image = base.quantize(16)
    elif mode in ("RGBA", "LA"):
        image = base.convert(mode)
        image.putalpha(picture(37, 21, 5).convert("L"))
    else:
        image = base.convert(mode)
    path = saved(image, tmp_path / f"x{suffix}")
    if path is None:
        pytest.skip(f"{suffix} holds no {mode}")
    try:
        expected = load_image(str(path))
    except OSError:
        pytest.skip(f"this Pillow does not read the {suffix} of {mode} that it wrote")
    policy = MediaPolicy(reading=Reading("clip")) if mode == "I;16" else POLICY
    assert np.array_equal(np.asarray(open_image(str(path), policy)), np.asarray(expected))
    assert image_size(str(path), policy) == (expected.height, expected.width)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_and_measured(tmp_path, monkeypatch, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    picture(40, 24).save(path, exif=exif)
    expected = load_image(str(path))
    assert (expected.height, expected.width) == ((40, 24) if orientation >= 5 else (24, 40))
    assert np.array_equal(np.asarray(open_image(str(path), POLICY)), np.asarray(expected))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
    assert image_size(str(path), POLICY) == (expected.height, expected.width)


def described(orientation):
    """Return XMP metadata with an orientation, the alternative to EXIF."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    )


def options_of(kind, orientation):
    """Return the options of `save` that write XMP in a format."""
    xmp = described(orientation)
    if kind == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        return {"pnginfo": info}
    if kind == ".tif":
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info.tagtype[700] = 1
        info[700] = xmp.encode()
        return {"tiffinfo": info}
    return {"xmp": xmp.encode()}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_orientation_in_xmp_is_applied_and_measured(tmp_path, monkeypatch, suffix, orientation):
    path = tmp_path / f"x{suffix}"
    picture(40, 24).save(path, **options_of(suffix, orientation))
    expected = load_image(str(path))
    assert expected.size == ((24, 40) if orientation >= 5 else (40, 24)), "vacuous: the orientation is not read"
    assert np.array_equal(np.asarray(open_image(str(path), POLICY)), np.asarray(expected))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
    assert image_size(str(path), POLICY) == (expected.height, expected.width)


@pytest.mark.parametrize("name", ["MPO", "ICO", "TGA", "PPM", "ICNS", "JPEG2000", "AVIF"])
def test_the_rarer_formats_are_measured_as_they_open(tmp_path, name):
    path = tmp_path / "x"
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [picture(64, 48, 1)], "exif": exif} if name == "MPO" else {}
    picture(64, 48).save(path, name, **more)
    expected = load_image(str(path))
    assert name != "MPO" or expected.size == (48, 64), "vacuous: the orientation is not read"
    assert image_size(str(path), POLICY) == (expected.height, expected.width)


def test_no_damage_to_a_file_escapes_as_another_error():
    """300 damaged files of each format raise DataError or open, and those that open are measured correctly."""
    rng, opened = np.random.default_rng(0), 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in FORMATS:
        buffer = io.BytesIO()
        picture(57, 33).save(buffer, name, **({} if name in ("GIF", "BMP") else {"exif": exif}))
        for _ in range(300):
            data = bytearray(buffer.getvalue())
            data = data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data
            data[rng.integers(min(len(data), 200))] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's own, about damaged metadata
                try:
                    image = open_image(bytes(data), MediaPolicy(max_image_pixels=100_000))
                except DataError:
                    continue
                assert image_size(bytes(data), POLICY) == (image.height, image.width)
                opened += 1
    assert 100 < opened < 1700, "vacuous: nothing was damaged, or everything"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of official cases")
def test_the_official_cases_open_as_the_official_processing_opens_them():
    paths = sorted((SHARED / "parity" / "images").iterdir())
    assert paths
    for path in paths:
        expected = load_image(str(path))
        assert np.array_equal(np.asarray(open_image(str(path), POLICY)), np.asarray(expected))
        assert image_size(str(path), POLICY) == (expected.height, expected.width)


def test_a_png_with_its_orientation_behind_the_pixels_is_measured_right(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(40, 24).save(buffer, "PNG")
    data, payload = buffer.getvalue(), exif.tobytes()[6:]
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload + struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    end = data.rindex(b"IEND") - 4
    path = tmp_path / "late.png"
    path.write_bytes(data[:end] + chunk + data[end:])
    assert load_image(str(path)).size == (24, 40), "vacuous: the late chunk is not read"
    assert image_size(str(path), POLICY) == (40, 24)


def test_bytes_base64_and_pil_open_alike(tmp_path):
    path = tmp_path / "a.png"
    picture(30, 20).save(path)
    data = path.read_bytes()
    bare, wrapped = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    values = [str(path), path, data, f"data:image/png;base64,{bare}", f"data:;base64,{wrapped}", bare, Image.open(path)]
    arrays = [np.asarray(open_image(value, POLICY)) for value in values]
    assert all(np.array_equal(array, arrays[0]) for array in arrays)
    assert {image_size(value, POLICY) for value in values} == {(20, 30)}


def test_an_allowed_url_is_fetched_and_a_wrong_one_is_named(tmp_path):
    picture(30, 20).save(tmp_path / "a.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    allowed = MediaPolicy(allow_urls=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert image_size(f"{url}/a.png", allowed) == (20, 30)
        with pytest.raises(DataError, match=r"none\.png cannot be fetched: .*404"):
            open_image(f"{url}/none.png", allowed)
        server.shutdown()
    for wrong in (f"{url}/a.png", "http://[::1"):
        with pytest.raises(DataError, match="cannot be fetched"):
            open_image(wrong, allowed)


def test_wrong_media_are_one_clear_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    picture(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:600])
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "PNG")
    for name in ("pipe.png", "pipe.jpg", "held.jpg"):
        os.mkfifo(tmp_path / name)
        held = os.open(tmp_path / name, os.O_RDWR) if name == "held.jpg" else None
        with pytest.raises(DataError, match=rf"{name} is a pipe or a device\. Give a file\."):
            image_size(str(tmp_path / name), POLICY)
    os.close(held)
    cases = [
        (str(tmp_path / "pipe.jpg"), r"pipe\.jpg is a pipe or a device"),
        (str(tmp_path / "none.png"), r"none\.png does not exist"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "text.png"), r"text\.png is not an image that can be read \(5 bytes\)"),
        (str(tmp_path / "empty.jpg"), r"empty\.jpg is not an image that can be read \(0 bytes\)"),
        (str(tmp_path / "cut.jpg"), r"cut\.jpg is damaged: "),
        ("https://example.org/a.png", r"is a URL\. Download it, or set data\.allow_urls=true"),
        ("data:image/png;base64,!!!", "not valid base64"),
        (b"GIF89a", "of 6 bytes is"),
        (3.5, "is a float"),
        ("/x" * 3000, "cannot be opened: File name too long"),
        (Image.open(io.BytesIO(buffer.getvalue()[:90])), "given as a PIL image is damaged"),
    ]
    for value, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            open_image(value, POLICY)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    path = tmp_path / "big.png"
    Image.new("1", (4000, 3000)).save(path)
    for ask in (image_size, open_image):
        with pytest.raises(DataError, match=r"4000 x 3000 = 12000000 pixels, above data\.max_image_pixels=1000000"):
            ask(str(path), MediaPolicy(max_image_pixels=1_000_000))


def test_relative_paths_start_at_the_media_root():
    assert resolve_path("a/b.png", "/data") == "/data/a/b.png"
    assert resolve_path("/abs/b.png", "/data") == "/abs/b.png"
    assert resolve_path("https://x/y.png", "/data") == "https://x/y.png"
    assert resolve_path("b.png", None) == "b.png"
    assert resolve_path(b"raw", "/data") == b"raw"
    assert resolve_path("iVBORw0KGgoAAAA", "/data") == "iVBORw0KGgoAAAA"
    assert resolve_path("iVBORw0KGgo.png", "/data") == "/data/iVBORw0KGgo.png"


class Stalled:
    """An image on a disk that hangs."""

    value = "/far/away/slow.png"

    def size(self):
        return 64, 64

    def open(self):
        threading.Event().wait()

    def __str__(self):
        return self.value


def test_a_disk_that_hangs_while_a_header_is_read_times_out_too(processor, monkeypatch):
    class Asleep(Stalled):
        def size(self):
            return self.open().size

    encoder = Encoder(processor, policy=MediaPolicy(image_timeout=0.3))
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    conversation = encoder.conversation({"image": [picture(64, 64)], "conversations": turns})
    user = conversation.messages[0]
    content = (ImagePart(Asleep()), *user.content[1:])
    late = replace(conversation, messages=(replace(user, content=content), *conversation.messages[1:]))
    with pytest.raises(DataError, match=r"record: image /far/away/slow.png cannot be read within data.image_timeout"):
        encoder(late)


def test_an_image_that_hangs_is_named_after_the_timeout(processor):
    encoder = Encoder(processor, policy=MediaPolicy(image_timeout=0.3))
    turns = [{"from": "human", "value": "<image><image>a"}, {"from": "gpt", "value": "b"}]
    conversation = encoder.conversation({"image": [picture(64, 64), picture(64, 64)], "conversations": turns})
    assert len(encoder(conversation)["image_grid_thw"]) == 2
    user = conversation.messages[0]
    content = (user.content[0], ImagePart(Stalled()), *user.content[2:])
    late = replace(conversation, messages=(replace(user, content=content), *conversation.messages[1:]))
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=r"record: image /far/away/slow.png cannot be read within data.image_timeout=0.3 s"
    ):
        encoder(late)
    assert time.monotonic() - begin < 10
