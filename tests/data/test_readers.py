"""Records of every format give the same conversations; a malformed record is a one-line error."""

import json

import pytest

from qwenvl_ft.data.conversation import Image, Limits, Message, Sampling, Source, Text, Video
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

SOURCE = Source("d", "d.jsonl:7")


def turns(*pairs):
    return [{"from": who, "value": text} for who, text in pairs]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_conversations_are_split_and_stripped_as_the_official_preprocessing_does():
    record = {
        "id": "x1",
        "image": ["a.png", "/abs/b.png"],
        "conversations": turns(("human", "  <image>\n Two <image>\n\nviews? \n"), ("gpt", " kept  as is \n")),
    }
    conversation = read_record(record, SOURCE, "/root")
    assert conversation.messages == (
        Message("user", (Image("/root/a.png"), Text("Two"), Image("/abs/b.png"), Text("views?"))),
        Message("assistant", (Text(" kept  as is \n"),)),
    )


def test_the_records_own_data_path_is_a_media_root():
    record = {"image": "a.png", "data_path": "sub", "conversations": turns(("human", "<image>"), ("gpt", "x"))}
    assert read_record(record, SOURCE, "/root").media(Image) == [Image("/root/sub/a.png")]


def test_messages_keep_their_text_and_take_every_spelling_of_an_image():
    spellings = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"image": "a.png"},
    ]
    for part in spellings:
        record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": " hi \n"}]}]}
        assert read_record(record, SOURCE, "/r").messages[0].content == (Image("/r/a.png"), Text(" hi \n"))


def test_messages_with_tags_take_the_records_images():
    record = {
        "images": ["a.png"],
        "videos": [["f0.png", "f1.png"]],
        "fps": 4,
        "messages": [{"role": "user", "content": "<image>\nand <video>"}, {"role": "assistant", "content": "y"}],
    }
    assert read_record(record, SOURCE, "/r").messages[0].content == (
        Image("/r/a.png"),
        Text("and"),
        Video(("/r/f0.png", "/r/f1.png"), 4.0),
    )


def test_a_bare_part_takes_the_next_of_the_records_own_media():
    record = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]}
        ],
    }
    content = read_record(record, SOURCE, "/r").messages[0].content
    assert content == (Image("/r/a.png"), Text("x"), Image("/r/b.png"))
    record["images"].append("c.png")
    with pytest.raises(DataError, match="1 of 3 media have no <image> tag"):
        read_record(record, SOURCE, "/r")


def test_absent_fields_may_be_null_or_empty():
    record = {
        "conversations": None,
        "image": [],
        "images": ["/a"],
        "messages": [{"role": "user", "content": "<image>"}],
    }
    assert read_record(record, SOURCE).media(Image) == [Image("/a")]


def test_tools_calls_and_loss_flags_survive():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    record = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call], "loss": False},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "a", "loss": True},
        ],
    }
    conversation = read_record(record, SOURCE)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [message.loss for message in conversation.messages] == [None, None, False, None, True]
    assert conversation.messages[2].tool_calls[0]["function"]["arguments"] == {"x": 1, "y": None}, "a null is a value"
    assert conversation.tools == ({"type": "function", "function": {"name": "f"}},)


def test_keys_of_a_record_and_of_its_turns_are_kept():
    """``system`` and ``tools`` of the record, ``loss`` or ``weight`` of a turn, the older ``function_call``."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}, {"from": "gpt", "value": "b"}]
    read = read_record({"system": "s", "tools": tools, "conversations": turns}, SOURCE)
    assert read.messages[0] == Message("system", (Text("s"),))
    assert [message.loss for message in read.messages] == [None, None, False, None]
    assert read.tools == tuple(tools)
    call = {"name": "f", "arguments": "{}"}
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": None, "function_call": call}]
    read = read_record({"system": "s", "tools": json.dumps(tools), "messages": messages}, SOURCE)
    assert [message.role for message in read.messages] == ["system", "assistant"]
    assert read.messages[1].tool_calls == ({"type": "function", "function": call},)
    assert read.tools == tuple(tools)


def test_tags_in_a_list_of_texts_take_the_records_media():
    content = [{"type": "text", "text": "look"}, {"type": "text", "text": "<image> here"}]
    record = {"images": ["a.png"], "messages": [{"role": "user", "content": content}]}
    assert read_record(record, SOURCE, "/r").messages[0].content == (Text("look"), Image("/r/a.png"), Text("here"))


def test_a_part_sets_its_own_limits_and_frame_sampling():
    image = {"image": "/a.png", "min_pixels": 1024, "max_pixels": 4096.0}
    video = {"video": "/a.mp4", "fps": 1, "max_frames": 8, "video_start": 1, "video_end": 2.5, "total_pixels": 9999}
    content = read_record({"messages": [user(image, video, {"video": "/a.mp4", "nframes": 6})]}, SOURCE)
    assert content.messages[0].content == (
        Image("/a.png", Limits(min_pixels=1024, max_pixels=4096)),
        Video("/a.mp4", 1.0, Limits(total_pixels=9999), Sampling(max_frames=8, start=1.0, end=2.5)),
        Video("/a.mp4", None, Limits(), Sampling(num_frames=6)),
    )


WRONG = [
    ("text", "a record must be a JSON object, not a str"),
    ({"prompt": 1}, "no format has the keys prompt"),
    ({"conversations": []}, "at least one turn"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\] must be"),
    ({"conversations": turns(("humman", "x"))}, r"conversations\[0\] has from='humman'\. Did you mean 'human'\?"),
    ({"conversations": turns(("human", "<image>"), ("gpt", "x"))}, r"more <image> tags than media \(0\)"),
    (
        {"image": ["a", "b"], "conversations": turns(("human", "<image>"), ("gpt", "x"))},
        "1 of 2 media have no <image> tag",
    ),
    (
        {"image": "a", "conversations": turns(("human", "x"), ("gpt", "<image>"))},
        r"conversations\[1\] is a gpt turn with a media tag",
    ),
    ({"image": [""], "conversations": turns(("human", "<image>"), ("gpt", "x"))}, "an empty image"),
    ({"image": "a", "images": ["b"], "conversations": turns(("human", "<image>"))}, "both 'image' and 'images'"),
    ({"video": [[]], "conversations": turns(("human", "<video>"))}, "an empty list of frames"),
    ({"messages": "hello"}, "'messages' must be a list"),
    ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\] has role='usr'\. Did you mean 'user'\?"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: content must be a text or a list of parts, not None"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] has type 'image' and no 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "imgae", "image": "a"}]}]}, "Did you mean 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has type 'text' and no text"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
        "has role 'assistant' and a medium",
    ),
    ({"messages": [{"role": "user", "content": "x"}], "tools": "f"}, "'tools' must be a list"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": "f"}]}, "'tool_calls' must be a list of calls"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}]},
        "Only an assistant calls tools",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "loss": "false"}]}, "has loss='false'. Write true or false"),
    ({"conversations": [{"from": "gpt", "value": "x", "loss": 7}]}, "has loss=7"),
    (
        {"conversations": [{"from": "gpt", "value": "x", "tool_calls": [1]}]},
        r"\[0\] has 'tool_calls'. Write .* 'messages'",
    ),
    ({"conversations": [{"from": "gpt", "value": "x", "loss": 1, "weight": 0}]}, "contradict each other"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "Only assistant turns are supervised"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]}, "without a 'name'"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, "'f' without 'arguments'"),
    ({"messages": [{"role": "user", "content": "x"}], "system": ["s"]}, "'system' must be a text"),
    (
        {"conversations": turns(("system", "a"), ("human", "x")), "system": "b"},
        "both a 'system' and a system message are given, and they differ",
    ),
    ({"conversations": turns(("human", "x")), "functions": [{"name": "f"}]}, "'functions' is the old spelling"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "<image>"}]}
            ]
        },
        "both as parts and as tags",
    ),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"has from=\['gpt'\]"),
    ({"messages": [{"role": "user", "content": [{"type": ["image"]}]}]}, r"has type=\['image'\]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "img": "a"}]}], "images": ["b"]}, "no 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["a"], "fps": "2"}]}]}, "fps='2' must be"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": []}]}]}, "an empty list of frames"),
    ({"messages": [user({"image": "a", "max_pixels": 0})]}, "max_pixels=0. Give a positive whole number"),
    ({"messages": [user({"image": "a", "max_pixels": 9, "min_pixels": 10})]}, "min_pixels=10 above max_pixels=9"),
    ({"messages": [user({"image": "a", "resized_width": 64})]}, "one of resized_height and resized_width"),
    ({"messages": [user({"image": "a", "nframes": 4})]}, "an image with nframes=4"),
    ({"messages": [user({"video": "a", "nframes": 4, "fps": 2})]}, "sets nframes and another rule"),
    ({"messages": [user({"video": "a", "min_frames": 9, "max_frames": 4})]}, "min_frames=9 above max_frames=4"),
    ({"messages": [user({"video": "a", "video_start": -1})]}, "video_start=-1. Give seconds"),
    ({"image": 5, "conversations": turns(("human", "<image>"))}, "the image 5 is a int"),
    ({"image": {"file": "a"}, "conversations": turns(("human", "<image>"))}, "is a dict. Give a path"),
    ({"data_path": 5, "conversations": turns(("human", "x"))}, "data_path=5 must be the path of a folder"),
    ({"video": "a", "fps": 0, "conversations": turns(("human", "<video>"))}, "fps=0 must be a positive number"),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_a_malformed_record_is_one_line_that_names_it(record, message):
    with pytest.raises(DataError, match=message) as caught:
        read_record(record, SOURCE)
    assert str(caught.value).startswith("d.jsonl:7: ")
    assert "\n" not in str(caught.value)


def test_a_sharegpt_turn_with_two_texts_is_refused():
    turn = {"from": "human", "value": "a", "content": "b"}
    record = {"conversations": [turn, {"from": "bot", "value": "c"}]}
    with pytest.raises(DataError, match=r"conversations\[0\] has both 'value' and 'content', and they differ"):
        read_record(record, Source("s", "s:1"))
    record["conversations"][0] = turn | {"content": None}
    assert read_record(record, Source("s", "s:1")).messages[0].content == (Text("a"),)
