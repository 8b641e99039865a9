"""A single record is augmented as in training: images, objects, size and summary together."""

import json

import numpy as np
import pytest
from dense_cases import COLOURS, dense_record, write_dense

from qwenvl_ft import AugmentationPreprocessor, load_jsonl
from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.compose import dense_target
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.errors import DataError

OPS = [{"hflip": {"prob": 0.5}}, {"rotate": {"max_deg": 10, "prob": 0.5}}, {"resize_by_scale": {"lo": 0.6, "hi": 1.5}}]


def preprocessor(folder, ops=OPS, seed=0, **settings):
    augmenter = Augmenter.from_config({"ops": ops} | settings)
    return AugmentationPreprocessor(augmenter, np.random.default_rng(seed), media_root=folder)


def test_boxes_match_the_new_image_and_the_original_record_is_unchanged(tmp_path):
    augment, sizes = preprocessor(tmp_path), set()
    for number in range(12):
        record = dense_record(number, tmp_path) | {"note": number}
        before = json.dumps(record)
        changed = augment(record)
        assert json.dumps(record) == before
        assert changed["note"] == number
        (image,) = changed["images"]
        assert image.size == (changed["width"], changed["height"])
        sizes.add(image.size)
        pixels = np.asarray(image).astype(int)
        for entry in changed["objects"]:
            ys, xs = np.nonzero(np.abs(pixels - COLOURS[entry["desc"].split("/")[0]]).sum(axis=2) < 90)
            seen = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.abs(np.array(entry["bbox_2d"]) - seen).max() < 2.5
        again = read_dense_record(changed, Source("d", "d:1"))
        assert dense_target(again.objects, again.size, DenseOptions())
    assert len(sizes) > 5, "vacuous: little changed"


def test_a_dropped_object_leaves_the_summary(tmp_path):
    record = dense_record(2, tmp_path)
    assert len(record["objects"]) == 3
    for seed in range(5):
        changed = preprocessor(tmp_path, [{"random_crop": {"lo": 0.5, "hi": 0.5, "prob": 1}}], seed)(record)
        if 0 < len(changed["objects"]) < 3:
            assert changed["summary"].count("\u00d71") == len(changed["objects"])
            return
    raise AssertionError("vacuous: nothing was dropped")


def test_an_image_of_another_size_is_an_error(tmp_path):
    record = dense_record(0, tmp_path) | {"width": 161}
    with pytest.raises(DataError, match="but its record states width=161"):
        preprocessor(tmp_path)(record)


def test_load_jsonl_gives_the_records_and_names_a_bad_line(tmp_path):
    path = write_dense(tmp_path, 3)
    assert [record["images"] for record in load_jsonl(path)] == [["0.png"], ["1.png"], ["2.png"]]
    path.write_text(path.read_text() + "\n{broken\n")
    with pytest.raises(DataError, match=r"dense\.jsonl:5: not valid JSON"):
        load_jsonl(path)
    with pytest.raises(DataError, match="does not exist"):
        load_jsonl(tmp_path / "nowhere.jsonl")
