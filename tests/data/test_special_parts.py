"""Parts of the kind type/value, reasoning, tool calls and results are read as what plain messages say."""

import copy
import json

import pytest
import torch

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.show import ChatTemplate
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError

CALL = {"name": "measure", "arguments": {"unit": "mm"}}
TOOLS = [{"type": "function", "function": {"name": "measure", "parameters": {}}}]
ASK = {"role": "user", "content": "How long?"}

THINKING = """{% set last = namespace(user=0) %}
{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% set text = namespace(all='') %}
{% for part in m.content %}{% if part.type == 'text' %}{% set text.all = text.all + part.text %}{% endif %}{% endfor %}
{% set answer = text.all %}{% set thought = '' %}
{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{% elif '</think>' in answer %}
{% set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{% set answer = answer.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<|im_start|>' + m.role + '\\n' -}}
{% if m.role == 'assistant' and loop.index0 > last.user -%}
{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') -}}
{% else -%}{{ answer -}}{% endif -%}
{{ '<|im_end|>\\n' -}}
{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
"""Writes reasoning as the thinking models' templates do: a block before the last answer, none in earlier ones."""


def read(messages, **record):
    return read_record({"messages": messages} | record, Source("d", "d.jsonl:7"), "/data")


def same(parts, plain, *, role="assistant", **record):
    """Read an answer's parts and a plain message (or several), and require the same conversation."""
    plain = plain if isinstance(plain, list) else [plain]
    assert read([ASK, {"role": role, "content": parts}], **record) == read([ASK, *plain], **record)


def test_value_is_read_for_texts_and_media_of_any_type():
    parts = [
        {"type": "image_url", "value": "a.png"},
        {"type": "text", "value": "What is <it>?"},
        {"type": "image", "value": "b.png", "max_pixels": 4096},
        {"type": "video_url", "value": "c.mp4"},
        {"value": "Say."},
    ]
    plain = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is <it>?"},
        {"type": "image", "image": "b.png", "max_pixels": 4096},
        {"type": "video", "video": "c.mp4"},
        {"type": "text", "text": "Say."},
    ]
    answer = {"role": "assistant", "content": "Yes."}
    found = read([{"role": "user", "content": parts}, answer])
    assert found == read([{"role": "user", "content": plain}, answer])
    assert found.unread == ()
    assert [part.value for part in found.messages[0].content if hasattr(part, "value")] == [
        "/data/a.png",
        "/data/b.png",
        "/data/c.mp4",
    ]


def test_a_single_part_may_be_an_object_instead_of_a_list():
    for part in ({"type": "text", "text": "Hi."}, {"type": "text", "value": "Hi."}):
        assert read([{"role": "user", "content": part}, ASK | {"role": "assistant"}]) == read(
            [{"role": "user", "content": "Hi."}, ASK | {"role": "assistant"}]
        )
    image = read([{"role": "user", "content": {"type": "image_url", "value": "a.png"}}, ASK | {"role": "assistant"}])
    assert image.messages[0].content[0].value == "/data/a.png"


def test_reasoning_is_a_think_block_before_the_answer():
    plain = {"role": "assistant", "content": "<think>\nIt is short.\n</think>\n\n5 mm."}
    same([{"type": "reasoning", "value": "\nIt is short.\n"}, {"type": "text", "value": "5 mm."}], plain)
    same([{"type": "thinking", "thinking": "It is short."}, {"type": "text", "text": "5 mm."}], plain)
    keyed = {"role": "assistant", "content": "5 mm.", "reasoning_content": "It is short."}
    assert read([ASK, keyed]) == read([ASK, plain])


def test_a_thinking_template_writes_it_as_it_writes_reasoning_content_itself(encoder, processor):
    encoder = copy.copy(encoder)
    encoder._template = ChatTemplate(processor.tokenizer, THINKING)
    turns = [
        ASK,
        {"role": "assistant", "content": [{"type": "reasoning", "value": "Early."}, {"type": "text", "value": "One."}]},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "Late."}, {"type": "text", "value": "Two."}]},
    ]
    own = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"][1]["value"]}],
            "reasoning_content": m["content"][0]["value"],
        }
        for m in turns
    ]
    expected = processor.tokenizer.apply_chat_template(own, chat_template=THINKING, tokenize=False)
    sample = encoder({"messages": turns})
    assert processor.tokenizer.decode(sample["input_ids"]) == expected
    assert "<think>\nLate.\n</think>\n\nTwo." in expected
    assert "Early" not in expected
    learned = processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert learned == "One.<|im_end|>\nLate.\n</think>\n\nTwo.<|im_end|>\n", "a prompt ends with <think>"


def test_tool_calls_and_results_are_the_templates_own(processor):
    call = {"type": "function", "function": CALL}
    results = [{"role": "tool", "content": "12"}, {"role": "tool", "content": '{"mm": 13}'}]
    parts = [
        {"type": "text", "value": "I measure."},
        {"type": "tool_call", "value": json.dumps(CALL)},
        {"type": "tool_call", "value": CALL},
        {"type": "tool_result", "value": "12"},
        {"type": "tool_result", "value": {"mm": 13}},
        {"type": "text", "value": "12 mm."},
    ]
    plain = [
        {"role": "assistant", "content": "I measure.", "tool_calls": [call, call]},
        *results,
        {"role": "assistant", "content": "12 mm."},
    ]
    same(parts, plain, tools=TOOLS)
    same([{"type": "tool_result", "value": "12"}], results[0], role="tool")
    same([{"type": "tool_result", "value": "12"}, {"type": "text", "value": "Go on."}],
         [results[0], {"role": "user", "content": "Go on."}], role="user")  # fmt: skip
    text = processor.tokenizer.decode(
        Encoder(processor)({"messages": [ASK, {"role": "assistant", "content": parts}], "tools": TOOLS})["input_ids"]
    )
    assert text.partition("How long?")[2].count('<tool_call>\n{"name": "measure", "arguments": {"unit": "mm"}}') == 2
    assert text.count("<tool_response>\n") == 2


def test_tools_of_a_system_message_are_the_records_tools():
    system = {"role": "system", "content": [{"type": "text", "value": "Be exact."}, {"type": "tools", "value": TOOLS}]}
    answer = {"role": "assistant", "content": "Yes."}
    assert read([system, ASK, answer]) == read([{"role": "system", "content": "Be exact."}, ASK, answer], tools=TOOLS)
    only = {"role": "system", "content": [{"type": "tools", "value": json.dumps(TOOLS)}]}
    assert read([only, ASK, answer]) == read([ASK, answer], tools=TOOLS)


@pytest.mark.parametrize(
    ("role", "parts", "message"),
    [
        ("user", [{"type": "reasoning", "value": "x"}], r"type 'reasoning' and role 'user', not 'assistant'"),
        ("assistant", [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "x"}], "after the answer began"),
        ("assistant", [{"type": "reasoning", "value": 3}], "must be a text, not 3"),
        ("assistant", [{"type": "reasoning"}], r"content\[0\] has type 'reasoning' and no value"),
        ("assistant", [{"type": "tool_call", "value": CALL}, {"type": "text", "text": "a"}], "follows a tool call"),
        ("assistant", [{"type": "tool_call", "value": "{"}], "is a tool call, which must be JSON"),
        ("assistant", [{"type": "tool_call", "value": {"name": "f"}}], r"must be \{'name'"),
        (
            "assistant",
            [{"type": "reasoning", "value": "x"}, {"type": "text", "text": "</think>a"}],
            "<think> block too",
        ),
        ("user", [{"type": "audio_url", "value": "a.wav"}], "a medium that the model has no input for"),
        ("user", [{"type": "tool_cal", "value": "x"}], "Did you mean 'tool_call'"),
    ],
)
def test_a_part_where_it_cannot_be_is_an_error_that_names_it(role, parts, message):
    with pytest.raises(DataError, match=message) as caught:
        read([{"role": role, "content": parts}])
    assert str(caught.value).startswith("d.jsonl:7")


def test_loss_weight_sets_the_weight_of_each_label_and_zero_leaves_the_turn_out(processor):
    turns = [
        {"role": "user", "content": "One?", "loss_weight": 0.0},
        {"role": "assistant", "content": "First answer.", "loss_weight": 0.3},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second.", "loss_weight": 0},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Third."},
    ]
    encoder = Encoder(processor)
    sample = encoder({"messages": turns})
    plain = [{key: value for key, value in turn.items() if key != "loss_weight"} for turn in turns]
    plain[3] |= {"loss": False}
    expected = encoder({"messages": plain})
    assert torch.equal(sample["labels"], expected["labels"])
    assert "label_weights" not in expected
    words = processor.tokenizer.decode
    learned = sample["labels"] != -100
    weights = sample["label_weights"]
    assert weights.dtype == torch.float64
    assert set(weights[learned].tolist()) == {0.3, 1.0}
    assert words(sample["labels"][learned & (weights == 0.3)]) == "First answer.<|im_end|>\n"
    assert words(sample["labels"][learned & (weights == 1)]) == "Third.<|im_end|>\n"
    spoken = [{"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]} | t for t in turns]
    spoken = [{k: v for k, v in t.items() if k not in ("role", "content")} for t in spoken]
    assert torch.equal(encoder({"conversations": spoken})["label_weights"], weights)
    assert "label_weights" not in Encoder(processor, turn_weights=False)({"messages": turns})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_keeps_the_weights_of_the_tokens_that_remain(processor, side):
    turns = [ASK, {"role": "assistant", "content": "Three long words here and there.", "loss_weight": 0.5}]
    whole = Encoder(processor)({"messages": turns})["label_weights"]
    length = len(whole) - 4
    cut = Encoder(processor, max_length=length, truncation_strategy=side)({"messages": turns})["label_weights"]
    assert torch.equal(cut, whole[:length] if side == "right" else whole[-length:])


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": "a", "loss_weight": 0.5}, "Only assistant turns are supervised"),
        ({"role": "assistant", "content": "a", "loss_weight": -1}, "loss_weight=-1. Give a number"),
        ({"role": "assistant", "content": "a", "loss_weight": "high"}, "loss_weight='high'"),
        ({"role": "assistant", "content": "a", "loss_weight": True}, "loss_weight=True"),
        ({"role": "assistant", "content": "a", "loss_weight": 0.5, "loss": False}, "contradict each other"),
        ({"role": "assistant", "content": "a", "loss_weight": 0, "loss": True}, "contradict each other"),
    ],
)
def test_a_loss_weight_that_is_none_is_an_error(turn, message):
    with pytest.raises(DataError, match=message):
        read([turn])
