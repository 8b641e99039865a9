"""Files of several frames of which none was chosen are counted, and nothing else is."""

import io
from pathlib import Path

import numpy as np
import pytest
from cases import ListRecords, picture
from PIL import Image

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.frames import unchosen_frames
from qwenvl_ft.data.media.images import MediaPolicy, open_image
from qwenvl_ft.data.media.reading import ReadAs, Reading
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import DataError

SUFFIXES = ("gif", "tif", "png", "webp")


def written(path, count):
    frames = [picture(64, 48, k) for k in range(count)]
    options = {"duration": 100} if path.suffix in (".gif", ".png", ".webp") else {}
    frames[0].save(path, save_all=count > 1, append_images=frames[1:], **(options if count > 1 else {}))
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == count, "vacuous"
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_several_frames_is_counted_unless_a_frame_is_chosen(tmp_path, suffix):
    one, many = written(tmp_path / f"one.{suffix}", 1), written(tmp_path / f"many.{suffix}", 3)
    plain, chosen = MediaPolicy(), MediaPolicy(reading=Reading("error", None, 0))
    assert [unchosen_frames(value, plain) for value in (one, many, Path(many).read_bytes())] == [0, 3, 3]
    assert unchosen_frames(many, chosen) == unchosen_frames(ReadAs(many, Reading(image_frame=1)), plain) == 0


def test_photos_with_previews_pil_images_and_base64_are_not_counted(tmp_path):
    preview = tmp_path / "photo.mpo"
    picture(64, 48).save(preview, "MPO", save_all=True, append_images=[picture(32, 24)])
    for value in (str(preview), picture(64, 48), "R0lGODlhAQABAAAAACw=", str(tmp_path / "absent.gif")):
        assert unchosen_frames(value, MediaPolicy()) == 0


def test_a_line_before_training_counts_them_for_each_data_set_also_from_the_cache(tmp_path, processor):
    paths = [written(tmp_path / f"{k}.gif", k + 1) for k in range(3)] + [
        written(tmp_path / f"{k}.tif", k) for k in (1, 2)
    ]
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    datasets = ["scans", "scans", "more", "more", "scans"]
    records = ListRecords([{"image": path, "conversations": turns} for path in paths], datasets=datasets)
    for _ in range(2):
        dataset = SampleDataset(records, Encoder(processor), name="data.train", cache_dir=tmp_path / "cache")
        assert dataset.remarks() == [
            f"data.train: {name} of several frames or pages, of which frame 0 is shown, e.g. {example}; "
            "data.image_frame chooses another, also as a key of a data set's entry or of a record"
            for name, example in (
                ("scans: 2 images are files", f"{paths[1]} (2 frames)"),
                ("more: 1 image is a file", f"{paths[2]} (3 frames)"),
            )
        ]
    policy = MediaPolicy(reading=Reading("error", None, 0))
    chosen = SampleDataset(records, Encoder(processor, policy=policy), cache_dir=tmp_path / "cache")
    assert chosen.remarks() == []


def test_a_chosen_frame_reaches_the_patches(tmp_path, processor):
    path = written(tmp_path / "x.tif", 3)
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    record = {"image": path, "image_frame": 2, "conversations": turns}
    file = io.BytesIO()
    picture(64, 48, 2).save(file, "PNG")
    encoder = Encoder(processor)
    wanted = encoder({"image": file.getvalue(), "conversations": turns})["pixel_values"]
    assert np.array_equal(encoder(record)["pixel_values"], wanted)
    assert not np.array_equal(encoder(record | {"image_frame": 0})["pixel_values"], wanted)


@pytest.mark.parametrize("frame", [None, 1])
def test_an_error_names_the_frame_of_a_file_that_has_several(tmp_path, frame):
    path = tmp_path / "pages.tif"
    pages = [picture(64, 48, k) for k in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_deflate")
    spoil(path, frame or 0)
    policy = MediaPolicy(reading=Reading("error", None, frame))
    with pytest.raises(DataError, match=rf"pages\.tif \(frame {frame or 0} of 3, counted from 0\) is damaged: "):
        open_image(str(path), policy)
    assert open_image(str(path), MediaPolicy(reading=Reading("error", None, 2))), "vacuous: all pages are damaged"
    pages[0].save(path, compression="tiff_deflate")
    spoil(path, 0)
    with pytest.raises(DataError, match=r"pages\.tif is damaged: "):
        open_image(str(path), policy if frame is None else MediaPolicy())


def spoil(path, frame):
    """Overwrite the compressed pixels of a TIFF's page."""
    with Image.open(path) as image:
        image.seek(frame)
        start, size = image.tag_v2[273][0], image.tag_v2[279][0]
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(bytes(content))
