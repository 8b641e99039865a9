r"""A backslash before a media tag makes it text, in every format: ``\<image>`` is read as ``<image>``."""

import pytest

from qwenvl_ft.cli.infer import record as question
from qwenvl_ft.data.conversation import Image, Source, Text, Video
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

USER = r"<image>The tag \<image> is not \<video> or \<audio>."
SHOWN = "The tag <image> is not <video> or <audio>."
ANSWER = r"Write \<image> where it belongs."
SPOKEN = "Write <image> where it belongs."
FORMS = {
    "conversations": {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]},
    "messages": {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": USER}]},
            {"role": "assistant", "content": [{"type": "text", "value": ANSWER}]},
        ]
    },
    "pairs": {"query": USER, "response": ANSWER},
    "sharegpt": {"conversations": [{"from": "user", "value": USER}, {"from": "bot", "value": ANSWER}]},
}


def read(record):
    return read_record(record, Source("d", "d"))


@pytest.mark.parametrize("form", FORMS)
def test_a_tag_behind_a_backslash_is_text_and_any_other_stands_for_a_medium(form):
    user, answer = read(FORMS[form] | {"image": "/a.png", "system": r"Say \<image>."}).messages[1:]
    assert user.content == (Image("/a.png"), Text(SHOWN))
    assert answer.content == (Text(SPOKEN),)
    assert read(FORMS[form] | {"image": "/a.png", "system": r"Say \<image>."}).messages[0].content == (
        Text("Say <image>."),
    )


def test_the_model_sees_the_tag_as_text(processor):
    text = {"messages": [{"role": "user", "content": r"What is \<image>?"}, {"role": "assistant", "content": ANSWER}]}
    sample = Encoder(processor)(text)
    assert "pixel_values" not in sample
    shown = processor.tokenizer.decode(sample["input_ids"])
    assert "What is <image>?" in shown
    assert SPOKEN in shown


def test_a_part_of_media_beside_a_text_with_a_literal_tag_is_no_conflict():
    parts = [{"type": "image", "image": "/a.png"}, {"type": "text", "text": r"Is \<image> a tag?"}]
    answer = {"role": "assistant", "content": "Yes."}
    (user, _) = read({"messages": [{"role": "user", "content": parts}, answer]}).messages
    assert user.content == (Image("/a.png"), Text("Is <image> a tag?"))
    parts[1]["text"] = "Is <image> a tag?"
    with pytest.raises(DataError, match="a backslash before a tag makes it text"):
        read({"messages": [{"role": "user", "content": parts}, answer]})


def test_a_video_set_that_writes_image_tags_keeps_literal_ones():
    turns = [{"from": "human", "value": "<image>\nIs \\<image> a tag?"}, {"from": "gpt", "value": "Yes."}]
    (user, _) = read({"video": "/a.mp4", "conversations": turns}).messages
    assert user.content == (Video("/a.mp4"), Text("Is <image> a tag?"))


def test_media_go_before_a_question_whose_only_tag_is_literal():
    (user, _) = read({"query": r"Is \<image> a tag?", "response": "Yes.", "images": ["/a.png"]}).messages
    assert user.content == (Image("/a.png"), Text("Is <image> a tag?"))
    (asked,) = read(question(r"Is \<image> a tag?", ["/a.png"])).messages
    assert asked.content == (Image("/a.png"), Text("Is <image> a tag?"))


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_the_error_for_a_tag_without_a_medium_says_how_to_write_it_as_text(role):
    with pytest.raises(DataError, match=r"meant as text, write (\\<image>|a backslash before the tag)"):
        read({"messages": [{"role": role, "content": "What is <image>?"}, {"role": "assistant", "content": "A tag."}]})
