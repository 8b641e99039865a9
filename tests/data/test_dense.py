"""Dense captions: answers compared with numbers calculated by hand, prompts, and pictures of the planned size."""

import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from cases import picture

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Image, Source, Text
from qwenvl_ft.data.dense.compose import (
    DenseImage,
    dense_conversation,
    dense_messages,
    dense_target,
    scaled_coordinates,
)
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.data.readers.dense import read
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.evaluation.localization import parse_objects

SOURCE = Source("racks", "racks.jsonl:7")
BOX = {"bbox_2d": [90, 120, 420, 360], "desc": "switch/vendorA,fully visible"}
QUAD = {"quad": [500, 100, 700, 130, 690, 260, 495, 235], "desc": "label/readable"}
LINE = {"line": [60, 700, 300, 640, 520, 690, 900, 610], "line_points": 4, "desc": "cable/tied,no sleeve"}
RACK = {
    "images": ["img/rack_07.jpg"],
    "width": 1200,
    "height": 800,
    "objects": [BOX, QUAD, LINE],
    "summary": "switch/vendorA/fully visible×1，label/readable×1，cable/tied/no sleeve×1",  # noqa: RUF001
}
SMALL = {"images": ["b.jpg"], "width": 200, "height": 100, "objects": [], "summary": "nothing there"}


def dense(record, source=SOURCE, root="/data"):
    return read_dense_record(record, source, root)


def answer_of(conversation):
    return conversation.messages[-1].content[0].text


def drawn_for(ops, size=(1200, 800), **settings):
    return Augmenter.from_config({"ops": ops, **settings}).draw(*size, np.random.default_rng(0))


def small_record(value):
    """Return a record of an image of 96 x 64 pixels without objects."""
    return {**RACK, "images": [value], "width": 96, "height": 64, "objects": [], "summary": "s"}


# -- the conversation --------------------------------------------------------------------------------------------------


def test_a_group_is_asked_about_in_one_turn_and_answered_in_one_json_object():
    conversation = dense_conversation([dense(RACK), dense(SMALL, Source("racks", "racks.jsonl:9"))], DenseOptions())
    shown = dense_messages(conversation)
    assert shown["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "图片_1: "},
                {"type": "image", "image": "/data/img/rack_07.jpg"},
                {"type": "text", "text": "图片_2: "},
                {"type": "image", "image": "/data/b.jpg"},
                {"type": "text", "text": "List every object in each picture."},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {
                    "type": "text",
                    "text": '{"图片_1": {'
                    '"object_1": {"desc": "switch/vendorA,fully visible", "bbox_2d": [75, 150, 350, 450]}, '
                    '"object_2": {"desc": "label/readable", "quad": [417, 125, 583, 162, 575, 325, 412, 294]}, '
                    '"object_3": {"desc": "cable/tied,no sleeve", "line_points": 4, '
                    '"line": [50, 875, 250, 800, 433, 862, 750, 762]}}, "图片_2": {}}',
                }
            ],
        },
    ]
    assert answer_of(conversation) == shown["messages"][1]["content"][0]["text"]
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    assert shown["system"] == conversation.messages[0].content[0].text
    assert conversation.source == Source("racks", "racks.jsonl:7 + racks.jsonl:9")


@pytest.mark.parametrize(
    ("emit_norm", "box", "line"),
    [
        ("none", [90, 120, 420, 360], [60, 700, 300, 640, 520, 690, 900, 610]),
        ("norm100", [8, 15, 35, 45], [5, 88, 25, 80, 43, 86, 75, 76]),
        ("norm1000", [75, 150, 350, 450], [50, 875, 250, 800, 433, 862, 750, 762]),
    ],
)
def test_coordinates_are_written_in_the_unit_of_emit_norm(emit_norm, box, line):
    target = dense_target([BOX, LINE], (1200, 800), DenseOptions(emit_norm=emit_norm))
    assert (target["object_1"]["bbox_2d"], target["object_2"]["line"]) == (box, line)
    assert f" {emit_norm.removeprefix('norm')}: x" in DenseOptions(emit_norm=emit_norm).prompts["dense"].system or (
        "pixels" in DenseOptions(emit_norm=emit_norm).prompts["dense"].system
    )


def test_halves_round_to_even_as_in_exact_arithmetic():
    """Compared with fractions for every pixel of some side lengths; dividing first would round some of them wrongly."""
    wrong_if_divided_first = 0
    for side in (48, 150, 800, 999, 1000, 1200, 4000):
        values = [value for x in range(side + 1) for value in (x, x)]
        for emit_norm, scale in (("norm100", 100), ("norm1000", 1000)):
            exact = [round(Fraction(value * scale, side)) for value in values]
            assert scaled_coordinates(values, (side, side), emit_norm) == exact
            wrong_if_divided_first += exact != [round(value / side * scale) for value in values]
    assert wrong_if_divided_first, "vacuous: any order of operations rounds alike"
    assert scaled_coordinates([0.5, 1.5, 2.5, 3.5], (10, 10), "none") == [0, 2, 2, 4]


def test_what_rounds_outwards_is_clamped_to_the_image():
    assert scaled_coordinates([-0.6, -1, 101, 50.9], (100, 50), "norm1000") == [0, 0, 1000, 1000]
    assert scaled_coordinates([-0.6, -1, 101, 50.9], (100, 50), "none") == [0, 0, 100, 50]


def test_numbers_of_an_answer_are_read_again_by_the_evaluation():
    found = parse_objects(answer_of(dense_conversation([dense(RACK)], DenseOptions(emit_norm="none"))))["图片_1"]
    assert [entry.desc for entry in found] == [BOX["desc"], QUAD["desc"], LINE["desc"]]
    assert found[1].points.ravel().tolist() == QUAD["quad"]


def test_a_line_states_its_points_before_them_whether_or_not_the_record_does():
    bare = {key: value for key, value in LINE.items() if key != "line_points"}
    for entry in (LINE, bare):
        record = dense({**RACK, "objects": [entry]})
        target = dense_target(record.objects, record.size, DenseOptions())
        assert list(target["object_1"].items())[:2] == [("desc", LINE["desc"]), ("line_points", 4)]
        assert list(target["object_1"]) == ["desc", "line_points", "line"]


def test_scheme_b_puts_objects_in_reading_order_because_it_says_so():
    def order(**settings):
        options = DenseOptions(**settings)
        says = "top to bottom" in options.prompts["dense"].system
        target = dense_target([LINE, BOX, QUAD], (1200, 800), options)
        return [entry["desc"].split("/")[0] for entry in target.values()], says

    given, sorted_ = ["cable", "switch", "label"], ["label", "switch", "cable"]
    assert order(scheme="A") == (given, False)
    assert order(scheme="b") == (sorted_, True)
    assert order(scheme="B", object_order="given") == (given, False)
    assert order(scheme="A", object_order="reading")[0] == sorted_


def test_images_of_one_record_share_its_label_and_labels_are_the_answers_keys():
    pair = dense({**RACK, "images": ["front.jpg", "thermal.jpg"]})
    conversation = dense_conversation([pair, dense(SMALL)], DenseOptions(label_pattern="Picture {i}"))
    texts = [part.text for part in conversation.messages[1].content if isinstance(part, Text)]
    assert texts[:-1] == ["Picture 1: ", "Picture 1: ", "Picture 2: "]
    assert list(json.loads(answer_of(conversation))) == ["Picture 1", "Picture 2"]
    assert '"Picture 1", "Picture 2" and so on' in conversation.messages[0].content[0].text


def test_a_summary_group_answers_with_one_line_a_picture():
    options = DenseOptions(scheme="B", summary_ratio=1)
    conversation = dense_conversation([dense(RACK), dense(SMALL)], options, "summary")
    assert json.loads(answer_of(conversation)) == {"图片_1": RACK["summary"], "图片_2": "nothing there"}
    assert conversation.messages[0].content[0].text == options.prompts["summary"].system
    assert options.prompts["summary"] != options.prompts["dense"]
    with pytest.raises(DataError, match=r"racks\.jsonl:7: summary=None: there is none"):
        dense_conversation([dense({**RACK, "summary": None})], options, "summary")


def test_a_single_record_is_read_alone():
    assert list(json.loads(answer_of(read(RACK, SOURCE, "/data")))) == ["图片_1"]


# -- prompts and options -----------------------------------------------------------------------------------------------


def test_prompts_name_the_labels_and_leave_no_blank():
    for scheme in "AB":
        for mode, prompt in DenseOptions(scheme=scheme).prompts.items():
            assert '"图片_1", "图片_2"' in prompt.system
            assert ("object_1" in prompt.system) == (mode == "dense")
            assert "$" not in prompt.system + prompt.user
            assert "\n\n" not in prompt.system
    assert len(DenseOptions(scheme="B").prompts["dense"].system) > len(DenseOptions().prompts["dense"].system)


def test_own_prompts_come_from_text_or_file_each_for_its_mode(tmp_path):
    file = tmp_path / "ask.txt"
    file.write_text("列出所有物体。\n", encoding="utf-8")
    options = DenseOptions(system="Be exact.", user=str(file), user_summary="One line each.")
    assert (options.prompts["dense"].system, options.prompts["dense"].user) == ("Be exact.", "列出所有物体。")
    assert options.prompts["summary"].system == DenseOptions().prompts["summary"].system
    assert options.prompts["summary"].user == "One line each."
    file.unlink()
    assert pickle.loads(pickle.dumps(options)).prompts == options.prompts, "read once, not in every worker"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "C"}, "unknown prompts.scheme 'C'. Known: A, B."),
        ({"emit_norm": "norm10"}, "unknown data.emit_norm 'norm10'. Did you mean 'norm100'?"),
        ({"summary_ratio": 1.5}, "data.summary_ratio=1.5 must be between 0"),
        ({"summary_ratio": -0.1}, "data.summary_ratio=-0.1 must be between 0"),
        ({"summary_ratio": float("nan")}, "data.summary_ratio=nan must be between 0"),
        ({"images_per_user_turn": 0}, "data.images_per_user_turn=0 must be 1 or more"),
        ({"label_pattern": "图片"}, "data.label_pattern='图片' must contain {i} once"),
        ({"object_order": "size"}, "unknown data.object_order 'size'"),
        ({"user": "gone.txt"}, "prompts.user='gone.txt' cannot be read: No such file"),
        ({"system": "  "}, "prompts.system is empty"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(options, message):
    with pytest.raises(RecipeError) as caught:
        DenseOptions(**options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_not_of_the_stated_size_is_refused_before_training(tmp_path, encoder):
    path = tmp_path / "a.png"
    picture(96, 64).save(path)
    good = dense_conversation([dense(small_record(str(path)))], DenseOptions())
    assert encoder.length(good) > 0
    bad = dense_conversation([dense(small_record(str(path)) | {"width": 128})], DenseOptions())
    for use in (encoder.length, encoder):
        with pytest.raises(DataError, match=r"racks\.jsonl:7: image .*a\.png is 96 x 64 pixels, but .* width=128"):
            use(bad)
    other = tmp_path / "b.png"
    picture(64, 64).save(other)
    pair = dense_conversation([dense({**small_record(str(path)), "images": [str(path), str(other)]})], DenseOptions())
    with pytest.raises(DataError, match="images that share objects must have one size"):
        encoder.length(pair)


def test_an_augmented_picture_is_of_the_promised_size_and_pickles_small(tmp_path):
    path = tmp_path / "a.png"
    picture(96, 64).save(path)
    drawn = drawn_for([{"hflip": {"prob": 1}}, {"pad_to_multiple": {"multiple": 100}}], (96, 64))
    image = DenseImage(str(path), (96, 64), drawn)
    assert image_size(image, MediaPolicy()) == (100, 100)
    opened = open_image(pickle.loads(pickle.dumps(image)), MediaPolicy())
    assert opened.size == (100, 100)
    np.testing.assert_array_equal(np.asarray(opened)[:64, :96], np.asarray(picture(96, 64))[:, ::-1])
    assert len(pickle.dumps(image)) < 1000


def test_coordinates_follow_the_augmented_frame():
    """Mirrored at a width of 1200, then padded to 1500 x 1000; calculated by hand."""
    drawn = drawn_for([{"hflip": {"prob": 1}}, {"pad_to_multiple": {"multiple": 500}}])
    target = json.loads(answer_of(dense_conversation([dense(RACK)], DenseOptions(), drawn=[drawn])))["图片_1"]
    assert target["object_1"]["bbox_2d"] == [520, 120, 740, 360]  # x: (1200 - 420) / 1500, (1200 - 90) / 1500
    assert target["object_2"]["quad"] == [333, 130, 467, 100, 470, 235, 340, 260]  # top left first again
    assert target["object_3"]["line"] == [760, 700, 600, 640, 453, 690, 200, 610]
    plain = json.loads(answer_of(dense_conversation([dense(RACK)], DenseOptions(), drawn=[None])))["图片_1"]
    assert plain != target, "vacuous: nothing was moved"


def test_a_dropped_object_leaves_the_answer_and_the_summary():
    drawn = drawn_for([{"scale": {"lo": 1.5, "hi": 1.5, "prob": 1}}], min_visible=0.7)
    record = dense(RACK)
    assert drawn.objects(record.objects)[1] == [0, 2], "of the box 63 percent are left, of the line less"
    answer = json.loads(answer_of(dense_conversation([record], DenseOptions(), drawn=[drawn])))["图片_1"]
    assert [entry["desc"] for entry in answer.values()] == ["label/readable"]
    summary = json.loads(answer_of(dense_conversation([record], DenseOptions(), "summary", drawn=[drawn])))
    assert summary == {"图片_1": "label/readable×1"}  # noqa: RUF001
    kept = drawn_for([{"hflip": {"prob": 1}}])
    own = dense({**RACK, "summary": "in own words"})
    assert json.loads(answer_of(dense_conversation([own], DenseOptions(), "summary", drawn=[kept]))) == {
        "图片_1": "in own words"
    }, "a summary that is still true stays"


def test_an_augmentation_that_leaves_no_object_is_not_applied(tmp_path):
    drawn = drawn_for([{"scale": {"lo": 3, "hi": 3, "prob": 1}}])
    record = dense({**RACK, "objects": [BOX], "summary": "switch"})
    assert drawn.objects(record.objects)[0] == []
    for mode in ("dense", "summary"):
        conversation = dense_conversation([record], DenseOptions(), mode, drawn=[drawn])
        assert conversation == dense_conversation([record], DenseOptions(), mode)
        assert conversation.media(Image)[0].value.drawn is None
    empty = dense_conversation([dense(SMALL)], DenseOptions(), drawn=[drawn_for([{"hflip": {"prob": 1}}], (200, 100))])
    assert empty.media(Image)[0].value.drawn is not None, "a record without objects has none to lose"


def test_the_whole_answer_is_supervised_and_nothing_else(tmp_path, encoder):
    path = tmp_path / "a.png"
    picture(96, 64).save(path)
    record = small_record(str(path)) | {"objects": [{"desc": "标签/清晰", "bbox_2d": [10, 5, 90, 60]}]}
    drawn = drawn_for([{"resize_by_scale": {"scales": [2.0], "prob": 1}}], (96, 64))
    conversation = dense_conversation([dense(record)] * 2, DenseOptions(), drawn=[drawn, None])
    sample = encoder(conversation)
    assert len(sample["input_ids"]) == encoder.length(conversation)
    assert sample["image_grid_thw"][0].tolist() != sample["image_grid_thw"][1].tolist()
    supervised = sample["labels"][sample["labels"] >= 0]
    assert encoder.processor.tokenizer.decode(supervised) == answer_of(conversation) + "<|im_end|>\n"


def test_messages_show_the_augmented_picture(tmp_path):
    path = tmp_path / "a.png"
    picture(96, 64).save(path)
    drawn = drawn_for([{"pad_to_multiple": {"multiple": 100}}], (96, 64))
    shown = dense_messages(dense_conversation([dense(small_record(str(path)))], DenseOptions(), drawn=[drawn]))
    assert shown["messages"][0]["content"][1]["image"].size == (100, 100)
