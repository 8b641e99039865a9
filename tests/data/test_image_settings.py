"""Which settings of reading apply to an image: its part's, its record's, its data set's or the recipe's."""

import json

import pytest

from qwenvl_ft.data.conversation import Image as ImagePart
from qwenvl_ft.data.conversation import Source, Video
from qwenvl_ft.data.media.images import MediaPolicy, file_of
from qwenvl_ft.data.media.reading import ReadAs, Reading, read_as
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS, register_dataset
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.recipe.load import load_recipe


def test_the_more_specific_setting_decides():
    base, record = Reading("minmax"), Reading("window", (0.0, 9.0))
    assert record.over(base) == record
    assert Reading(image_frame=2).over(base) == Reading("minmax", None, 2)
    assert Reading("window").over(Reading("window", (0.0, 5.0), 1)) == Reading("window", (0.0, 5.0), 1)
    assert Reading("window").over(base) == Reading("window")
    part = read_as(read_as("a.png", Reading(image_frame=1)), Reading("clip", None, 4))
    assert part == ReadAs("a.png", Reading("clip", None, 1))
    assert file_of(part) == "a.png"


RECORD = {
    "image": ["a.png", "b.png"],
    "conversations": [{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "y"}],
}


def readings(record):
    conversation = read_record(record, Source("d", "d[0]"), "/media")
    images = [image.value for image in conversation.media(ImagePart)]
    frames = [frame for video in conversation.media(Video) for frame in video.value]
    return [getattr(value, "reading", None) for value in images + frames]


def test_a_records_keys_apply_to_all_its_images_and_a_parts_keys_to_its_own():
    assert readings(RECORD) == [None, None]
    assert readings(RECORD | {"window": [-160, 240]}) == [Reading("window", (-160.0, 240.0))] * 2
    assert readings(RECORD | {"high_bit_depth": "minmax", "image_frame": 3}) == [Reading("minmax", None, 3)] * 2
    content = [
        {"type": "image", "image": "a.png", "window": [0, 1]},
        {"type": "image", "image": "b.png", "image_frame": 2},
        {"type": "video", "video": ["c.png", "d.png"]},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
    own, frame = Reading("window", (0.0, 1.0)), Reading("clip", None, 2)
    assert readings({"messages": messages, "high_bit_depth": "clip"}) == [own, frame, *[Reading("clip")] * 2]


@pytest.mark.parametrize("kind", ["pairs", "coco", "dense"])
def test_a_records_keys_reach_the_images_of_every_format(kind):
    dense = {"images": ["a.png"], "width": 9, "height": 9, "objects": [{"desc": "x", "bbox_2d": [1, 1, 5, 5]}]}
    record = {
        "pairs": {"query": "<image>what?", "response": "x", "images": ["a.png"]},
        "coco": dense | {"categories": ["x"]},
        "dense": dense,
    }[kind] | {"window": [1, 9]}
    [image] = read_record(record, Source("d", "d[0]"), "/m").media(ImagePart)
    value = image.value.value if kind == "dense" else image.value
    assert value == ReadAs("/m/a.png", Reading("window", (1.0, 9.0)))


def test_a_key_of_that_name_in_a_record_without_images_is_left_alone():
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    assert readings({"conversations": turns, "window": "the kitchen window"}) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": [240, -160]}, r"d\[0\]: window=\[240, -160\] must be two numbers, the lower first"),
        ({"window": "lung"}, "window='lung' must be two numbers"),
        ({"window": [0, float("nan")]}, "must be two numbers"),
        ({"high_bit_depth": "wide"}, "high_bit_depth='wide' is unknown. Use one of error, window"),
        ({"high_bit_depth": "clip", "window": [0, 1]}, "has an effect only with .*high_bit_depth=window, not clip"),
        ({"image_frame": -1}, "image_frame=-1 must be the number of a frame, page or slice, counted from 0"),
    ],
)
def test_a_malformed_key_is_an_error_that_names_the_record(keys, message):
    with pytest.raises(DataError, match=message):
        readings(RECORD | keys)


def test_a_video_file_has_no_such_setting():
    content = [{"type": "video", "video": "a.mp4", "window": [0, 1]}]
    with pytest.raises(DataError, match=r"content\[0\] is a video file with a setting of images"):
        read_record({"messages": [{"role": "user", "content": content}]}, Source("d", "d[0]"))


def test_a_data_sets_entry_applies_to_its_records_that_say_nothing(tmp_path):
    lines = [RECORD, RECORD | {"window": [0, 9]}, RECORD | {"image_frame": 5}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plain = load_records(str(tmp_path / "a.jsonl"))
    try:
        register_dataset("ct", str(tmp_path / "a.jsonl"), high_bit_depth="percentile", image_frame=1)
        records = load_records("ct")
        with pytest.raises(DataError, match="data set ct: window=3 must be two numbers"):
            register_dataset("ct", "a.jsonl", window=3)
        with pytest.raises(DataError, match=r"unknown key 'windows'.* Did you mean 'window'"):
            register_dataset("ct", "a.jsonl", windows=3)
    finally:
        DATASETS.pop("ct", None)
    found = [readings(records[place][0])[0] for place in range(3)]
    assert found == [
        Reading("percentile", None, 1),
        Reading("window", (0.0, 9.0), 1),
        Reading("percentile", None, 5),
    ]
    assert records.fingerprint != plain.fingerprint, "the frame can change sizes"


def test_a_recipe_sets_them_for_all_data_and_for_one_data_set(tmp_path):
    sets = {"ct": {"annotation_path": "a.jsonl", "window": [-160, 240]}}
    recipe = load_recipe(
        overrides=["data.high_bit_depth=window", "data.window=[0,4095]", f"data.datasets={json.dumps(sets)}"]
    )
    assert MediaPolicy.of(recipe.data).reading == Reading("window", (0.0, 4095.0))
    for wrong, message in (
        (
            ["data.window=[0,9]"],
            r"data\.window=\[0, 9\] has an effect only with data\.high_bit_depth=window, not error",
        ),
        (["data.high_bit_depth=window", "data.window=[9,0]"], "must be two numbers, the lower first"),
        (['data.datasets={"a": {"annotation_path": "a.jsonl", "window": 5}}'], r"data\.datasets\.a\.window=5"),
        (['data.datasets={"a": {"annotation_path": 5}}'], r"data\.datasets\.a\.annotation_path=5 must be a text"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(overrides=wrong)
