"""Records in the formats of other libraries become the intended conversation."""

import json

import pytest
from cases import picture

from qwenvl_ft.data.conversation import Image, Source, Text, Video
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

SOURCE = Source("d", "d.jsonl:7")


def read(record):
    return read_record(record, SOURCE, "/r")


def same(record, messages, **more):
    """Return True if a record gives the same conversation as these messages."""
    return read(record) == read({"messages": messages} | more)


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# -- questions and answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "question", "answer"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n1, 2", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
        (
            {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "qa"},
            "Who?\nAnn sang.",
            "Ann",
        ),
        ({"query": " kept  ", "response": "as it is\n"}, " kept  ", "as it is\n"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"question": "How many?", "answer": 0}, "How many?", "0"),
    ],
)
def test_a_question_and_its_answer(record, question, answer):
    assert same(record, chat(question, answer))


def test_history_and_system_stand_before_the_question():
    record = {"system": "Be brief.", "query": "q2", "response": "r2", "history": [["q0", "r0"], ["q1", "r1"]]}
    assert same(record, [{"role": "system", "content": "Be brief."}, *chat("q0", "r0", "q1", "r1", "q2", "r2")])


def test_media_stand_at_their_tags_or_before_the_first_question():
    record = {"images": ["a.png", "b.png"], "video": "c.mp4", "query": "q1", "response": "r", "history": [["q0", "r"]]}
    first = read(record).messages[0].content
    assert first == (Image("/r/a.png"), Image("/r/b.png"), Video("/r/c.mp4"), Text("q0"))
    tagged = {"image": "a.png", "query": "this <image>?", "response": "r"}
    assert read(tagged).messages[0].content == (Text("this"), Image("/r/a.png"), Text("?"))
    with pytest.raises(DataError, match="1 of 2 media have no <image> tag"):
        read(tagged | {"image": ["a.png", "b.png"]})


def test_lists_of_pairs():
    record = {
        "images": ["a.png"],
        "texts": [{"user": "q", "assistant": "r", "source": "x"}, {"user": "w", "assistant": "s"}],
    }
    assert same(record, chat("<image>q", "r", "w", "s"), images=["a.png"])
    swift = {"system": "s", "conversation": [{"human": "q", "assistant": "r"}]}
    assert same(swift, [{"role": "system", "content": "s"}, *chat("q", "r")])


# -- ShareGPT ------------------------------------------------------------------------------------------------------

CALL = {"name": "measure", "arguments": {"unit": "mm"}}
TOOLS = [{"type": "function", "function": {"name": "measure", "parameters": {}}}]


@pytest.mark.parametrize(
    ("key", "who", "what", "roles"),
    [
        ("conversations", "from", "value", ("human", "function_call", "observation", "gpt")),
        ("conversations", "role", "content", ("user", "tool_call", "tool", "assistant")),
        ("messages", "role", "content", ("user", "tool_call", "tool_response", "assistant")),
    ],
)
@pytest.mark.parametrize("call", [CALL, [CALL], json.dumps(CALL), json.dumps([CALL])])
def test_tool_calls_and_their_results(key, who, what, roles, call):
    values = ("<image>\nHow long?", call, "12", "12 mm.")
    turns = [{who: role, what: value} for role, value in zip(roles, values, strict=True)]
    conversation = read({key: turns, "images": ["a.png"], "tools": TOOLS})
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[0].content == (Image("/r/a.png"), Text("How long?"))
    assert conversation.messages[1].tool_calls == ({"type": "function", "function": CALL},)
    assert conversation.messages[2].content == (Text("12"),)
    assert conversation.tools == tuple(TOOLS)


def test_tool_results_are_in_the_input_and_never_supervised(encoder):
    """The official loader treats every role but human as the assistant."""
    turns = [("human", "Q"), ("function_call", json.dumps(CALL)), ("observation", "SEEN"), ("gpt", "A")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": TOOLS}
    sample = encoder(record)
    decode = encoder.processor.tokenizer.decode
    learned = decode(sample["labels"][sample["labels"] != -100])
    assert "SEEN" in decode(sample["input_ids"])
    assert "SEEN" not in learned
    assert "measure" in learned
    assert learned.endswith("A<|im_end|>\n")


def test_conversations_written_as_messages_and_other_names():
    assert same({"conversations": chat("q", "r")}, chat("q", "r"))
    other = [{"from": "human", "value": " q\n"}, {"from": "chatgpt", "value": " r", "loss": False}]
    conversation = read({"conversations": other})
    assert conversation.messages[0].content == (Text("q"),), "stripped as in conversations"
    assert conversation.messages[1].content == (Text(" r"),)
    assert conversation.messages[1].loss is False


# -- LLaVA ---------------------------------------------------------------------------------------------------------


def test_llavas_image_tag_may_stand_for_a_video():
    turns = [{"from": "human", "value": "<image>\nWhat falls?"}, {"from": "gpt", "value": "A cup."}]
    video = read({"id": 1, "video": "a.mp4", "data_source": "x", "conversations": turns})
    assert video.messages[0].content == (Video("/r/a.mp4"), Text("What falls?"))
    image = read({"id": 1, "image": "a.jpg", "conversations": turns})
    assert image.messages[0].content == (Image("/r/a.jpg"), Text("What falls?"))
    assert read({"id": 2, "model": "", "conversations": [{"from": "human", "value": "Hi"}]}).media(Image) == []


# -- grounding -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    picture(200, 100).save(tmp_path / "wide.png")
    picture(50, 400).save(tmp_path / "tall.png")
    return [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]


def grounded(objects, images, answer="<bbox><bbox>", question="Find the <ref-object>."):
    tags = "<image>" * len(images)
    conversation = read({"images": images, "messages": chat(tags + question, answer), "objects": objects})
    return conversation.messages[0].content[-1].text, conversation.messages[1].content[0].text


def test_pixels_become_thousandths_for_every_box(pictures):
    """ms-swift scales only as many boxes as there are names, which would leave the second one in pixels. It also
    truncates fractions, which moves a box by up to one."""
    objects = {"ref": ["sheep"], "bbox": [[20, 10, 99.9, 50], [150.2, 60, 200, 100]]}
    question, answer = grounded(objects, pictures[:1])
    assert question == "Find the sheep."
    assert answer == "[100, 100, 500, 500][751, 600, 1000, 1000]"  # x * 5, y * 10


def test_every_type_of_box_gives_the_same_answer(pictures):
    kinds = {
        "real": [[20, 10, 100, 50]],
        "norm1": [[0.1, 0.1, 0.5, 0.5]],
        "norm1000": [[100, 100, 500, 500]],
    }
    answers = {
        kind: grounded({"bbox": box, "bbox_type": kind}, pictures[:1], "<bbox>", "Where?")
        for kind, box in kinds.items()
    }
    assert set(answers.values()) == {("Where?", "[100, 100, 500, 500]")}


def test_a_box_belongs_to_its_image_and_a_point_is_two_numbers(pictures):
    objects = {"bbox": [[20, 10, 100, 50], [25, 40]], "image_id": [0, 1]}
    assert grounded(objects, pictures, "<bbox> and <bbox>", "Where?")[1] == "[100, 100, 500, 500] and [500, 100]"
    stated = objects | {"width": [400, 50], "height": [100, 100]}
    assert grounded(stated, ["none.png", "there.png"], "<bbox>, <bbox>", "?")[1] == "[50, 100, 250, 500], [500, 400]"


def test_boxes_in_any_shape_of_turn(pictures):
    objects = {"ref": ["cup"], "bbox": [[20, 10, 100, 50]]}
    texts = ("<image><ref-object>?", "<bbox>")
    expected = read({"images": pictures[:1], "messages": chat("<image>cup?", "[100, 100, 500, 500]")})
    shapes = [
        {"conversations": [{"from": f, "value": t} for f, t in zip(("human", "gpt"), texts, strict=True)]},
        {"query": texts[0], "response": texts[1]},
        {
            "messages": [
                {"role": r, "content": [{"type": "text", "text": t}]}
                for r, t in zip(("user", "assistant"), ("<ref-object>?", "<bbox>"), strict=True)
            ]
        },
    ]
    shapes[2]["messages"][0]["content"].insert(0, {"type": "image"})
    for shape in shapes:
        assert read(shape | {"images": pictures[:1], "objects": objects}) == expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "{}"},
        {"type": "image", "value": "{}"},
        {"type": "image_url", "value": "{}"},
        {"type": "image_url", "image_url": {"url": "{}"}},
        {"image": "{}"},
    ],
)
def test_boxes_in_pixels_find_the_size_of_an_image_part_of_any_spelling(pictures, part):
    part = json.loads(json.dumps(part).replace("{}", pictures[0]))
    messages = [
        {"role": "user", "content": [part, {"type": "text", "value": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "<bbox>"}]},
    ]
    conversation = read({"messages": messages, "objects": {"bbox": [[20, 10, 100, 50]]}})
    assert conversation.messages[1].content == (Text("[100, 100, 500, 500]"),)


WRONG_BOXES = [
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, r"more <bbox> tags than entries \(1\) in objects"),
    ({"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]] * 2}, "1 of 2 entries in objects have no <ref-object> tag"),
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4], [1, 2, 3]]}, r"bbox\[1\]=\[1, 2, 3\] must be \[x1, y1, x2, y2\] or a point"),
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4], [1, 2, 300, 4]]}, r"bbox\[1\]=.* is outside: x goes from 0 to 200"),
    ({"ref": ["a"], "bbox": [[3, 2, 1, 4]] * 2}, r"bbox\[0\]=.* has no area"),
    (
        {"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "bbox_type": "norm1"},
        "outside: y goes from 0 to 1. Check objects.bbox_type",
    ),
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "bbox_type": "norm"}, "bbox_type='norm'. Did you mean 'norm1"),
    (
        {"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "image_id": [0]},
        r"image_id=\[0\] must hold one image index for each of the 2",
    ),
    (
        {"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "image_id": [0, 1]},
        r"bbox\[1\] has image_id=1, but there are 1",
    ),
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "width": [9, 9]}, "must be lists of 1, one per image"),
    ({"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2, "boxes": 1}, "objects has the unknown key 'boxes'"),
    ({"ref": "a", "bbox": []}, "objects.ref must be a list of texts"),
    ({"ref": ["a"], "bbox": {}}, "more <bbox> tags"),
    ({"ref": ["a"], "bbox": {"x": 1}}, "objects.bbox must be a list of boxes"),
]


@pytest.mark.parametrize(("objects", "message"), WRONG_BOXES)
def test_a_wrong_box_is_one_line_that_names_it(objects, message, pictures):
    with pytest.raises(DataError, match=message) as caught:
        grounded(objects, pictures[:1])
    assert str(caught.value).startswith("d.jsonl:7: ")
    assert "\n" not in str(caught.value)


def test_which_image_a_box_belongs_to_is_never_guessed(pictures):
    with pytest.raises(DataError, match=r"there are 2 images\. Give objects\.image_id"):
        grounded({"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2}, pictures)
    with pytest.raises(DataError, match=r"bbox\[0\]: image .* is a URL.* Or give objects\.width"):
        grounded({"bbox": [[1, 2, 3, 4]]}, ["http://localhost/a.png"], "<bbox>", "?")


# -- errors for other records ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversation": 1, "id": 2}, "keys conversation, id. Nearly: 'conversation' instead of 'conversations'"),
        ({"mesages": []}, "Nearly: 'mesages' instead of 'messages'"),
        ({"query": "q", "image": "a"}, "Nearly: 'query' without 'response'"),
        ({"instruction": "q", "ouput": "a"}, "'ouput' instead of 'output'"),
        ({"x": 1, "messages": None}, r"keys x\. Known: conversations, messages, instruction \+ output"),
    ],
)
def test_the_error_for_a_record_of_no_known_format_names_the_nearest_one(record, message):
    with pytest.raises(DataError, match=message):
        read(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": ["q"], "response": "r"}, r"'query' must be a text, not \['q'\]"),
        ({"query": "q", "response": True}, "'response' must be a text"),
        ({"query": "q", "response": "r", "history": [["q"]]}, r"'history' must be a list of \[question, answer\]"),
        ({"texts": [{"user": "q"}]}, r"texts\[0\] must be {'user': text, 'assistant': text}"),
        (
            {"conversations": [{"from": "tool_call", "value": "{"}]},
            r"conversations\[0\] is a tool call, which must be JSON",
        ),
        ({"conversations": [{"from": "tool_call", "value": "{}"}]}, r"must be {'name': ..., 'arguments': ...}"),
        (
            {"conversations": [{"role": "usr", "content": "x"}]},
            r"conversations\[0\] has the role 'usr'. Did you mean 'user'",
        ),
        ({"conversations": [{"role": "user", "content": "x"}, 5]}, r"conversations\[1\] must be"),
    ],
)
def test_a_malformed_record_is_one_line_that_names_it(record, message):
    with pytest.raises(DataError, match=message) as caught:
        read(record)
    assert str(caught.value).startswith("d.jsonl:7: ")
