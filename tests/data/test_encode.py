"""Samples against the official outputs and against hand-made expectations."""

import copy
import json
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional
from cases import SHARED, picture
from qwen_vl_utils.vision_process import fetch_image
from torchvision.transforms import InterpolationMode

from qwenvl_ft.data.conversation import Conversation, Message, Source, Text
from qwenvl_ft.data.encode.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.show import ChatTemplate
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.model.load import load_processor

CASES = SHARED / "parity" / "expected.json"


@pytest.fixture(scope="module")
def real_processors():
    """The released processor, by (min_pixels, max_pixels)."""
    if not CASES.exists():
        pytest.skip("the official cases are not here")
    made = {}

    def get(low, high):
        if (low, high) not in made:
            made[low, high] = load_processor(str(SHARED / "qwen3vl_processor"), min_pixels=low, max_pixels=high)
        return made[low, high]

    return get


def spans(labels):
    """[begin, end) of each supervised stretch."""
    on = np.concatenate([[0], (labels.numpy() != -100).astype(int), [0]])
    edges = np.flatnonzero(np.diff(on))
    return edges.reshape(-1, 2).tolist()


@pytest.mark.parametrize("index", range(16))
def test_official_cases_are_reproduced(real_processors, index):
    case = json.loads(CASES.read_text())[index]
    encoder = Encoder(real_processors(case["min_pixels"], case["max_pixels"]))
    root = str(SHARED / "parity" / "images")
    sample = encoder(case["record"], root)
    assert sample["input_ids"].tolist() == case["input_ids"]
    assert spans(sample["labels"]) == case["label_spans"]
    assert sample["position_ids"].tolist() == case["position_ids"]
    assert sample["image_grid_thw"].tolist() == case["image_grid_thw"]
    assert list(sample["pixel_values"].shape) == case["pixel_values_shape"]
    step = max(1, len(sample["pixel_values"]) // 16)  # the cases keep about sixteen rows
    means = sample["pixel_values"].float().mean(dim=1).numpy()[::step]
    np.testing.assert_allclose(means, case["pixel_values_row_mean"], atol=1e-3)
    assert encoder.length(case["record"], root) == len(case["input_ids"])


def test_labels_decode_to_the_answers(encoder, processor, mixed_records):
    sample = encoder(mixed_records[2])
    text = [processor.tokenizer.decode(sample["labels"][begin:end].tolist()) for begin, end in spans(sample["labels"])]
    assert text == ["No.<|im_end|>\n", "Colours differ.\nSizes too.<|im_end|>\n"]


def test_a_user_who_writes_assistant_is_not_trained_on(encoder, processor):
    record = {"conversations": [{"from": "human", "value": "assistant\nsay x"}, {"from": "gpt", "value": "x"}]}
    sample = encoder(record)
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0].tolist()) == "x<|im_end|>\n"


@pytest.mark.parametrize(
    "answer", ["\n\nfirst a gap", "", "   ", "é decomposed e\u0301", "<think>hm</think>\n\nyes", "日本語。"]
)
def test_any_answer_is_supervised_whole(encoder, processor, answer):
    """The supervised tokens and what stands before them render the whole conversation again."""
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]}
    sample = encoder(record)
    (span,) = spans(sample["labels"])
    before = processor.tokenizer.decode(sample["input_ids"][: span[0]].tolist())
    after = processor.tokenizer.decode(sample["input_ids"][span[0] :].tolist())
    assert before.startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert after.endswith("<|im_end|>\n")
    assert span[1] == len(sample["input_ids"])
    assert before + after == processor.tokenizer.decode(sample["input_ids"].tolist())


def test_one_turn_can_be_left_unsupervised(encoder, processor):
    messages = tuple(
        Message(role, (Text(text),), loss=loss)
        for role, text, loss in [
            ("user", "a", None),
            ("assistant", "b", False),
            ("user", "c", None),
            ("assistant", "d", None),
        ]
    )
    sample = encoder(Conversation(messages, Source("x", "x")))
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0].tolist()) == "d<|im_end|>\n"


def test_video_text_has_the_form_of_the_released_models(encoder, processor, mixed_records):
    """A time before each frame pair and no outer border; three pairs from five frames at 2 frames a second."""
    sample = encoder(mixed_records[3])
    text = processor.tokenizer.decode(sample["input_ids"].tolist()).replace("<|video_pad|>", "")
    frame = "<|vision_start|><|vision_end|>"
    assert text.startswith(f"<|im_start|>user\n<0.2 seconds>{frame}<1.2 seconds>{frame}<2.0 seconds>{frame}What moves?")


def test_video_tokens_equal_the_processor_without_its_outer_borders(processor, encoder, mixed_records):
    """Independent reference: the installed processor's own text, its outer pair removed."""
    frames = mixed_records[3]["video"][0]
    video = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])
    from transformers.video_utils import VideoMetadata

    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False)
    out = processor(
        text=[text],
        videos=[video],
        video_metadata=[VideoMetadata(total_num_frames=5, fps=2.0, frames_indices=list(range(5)))],
        do_sample_frames=False,
        return_tensors="pt",
    )
    sample = encoder(mixed_records[3])
    ids = out["input_ids"][0].tolist()
    start, end = processor.vision_start_token_id, processor.vision_end_token_id
    outer = ids.index(start)
    last = len(ids) - 1 - ids[::-1].index(end)
    if ids[outer + 1] != processor.video_token_id:  # transformers 5.9 and older write no outer pair
        ids = ids[:outer] + ids[outer + 1 : last] + ids[last + 1 :]
    assert sample["input_ids"][: len(ids)].tolist() == ids
    torch.testing.assert_close(sample["pixel_values_videos"], out["pixel_values_videos"])
    assert sample["video_grid_thw"].tolist() == out["video_grid_thw"].tolist()


def test_prompt_is_the_sample_up_to_the_answer(encoder, mixed_records):
    sample, prompt = encoder(mixed_records[2]), encoder.prompt(mixed_records[2])
    begin = spans(sample["labels"])[-1][0]
    assert prompt["input_ids"].tolist() == sample["input_ids"][:begin].tolist()
    assert (prompt["labels"] == -100).all()
    torch.testing.assert_close(prompt["pixel_values"], sample["pixel_values"])


def test_too_long_is_an_error_that_says_what_to_do(processor, mixed_records):
    for strategy in ("raise", "delete"):
        with pytest.raises(
            TooLong, match=r"tokens, .*template\.max_length is 20\. Raise it, lower template\.max_pixels"
        ):
            Encoder(processor, max_length=20, truncation_strategy=strategy)(mixed_records[0])


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_cutting_never_goes_through_a_medium(processor, encoder, mixed_records, strategy):
    """Every length limit: at most max_length tokens, media whole, and what stays is what stood there."""
    whole = encoder(mixed_records[2])
    ids = whole["input_ids"].tolist()
    pad, merge = processor.image_token_id, processor.image_processor.merge_size**2
    seen = set()
    for limit in range(1, len(ids)):
        try:
            sample = Encoder(processor, max_length=limit, truncation_strategy=strategy)(mixed_records[2])
        except Unsupervised:
            seen.add("unsupervised")
            continue
        cut = sample["input_ids"].tolist()
        assert len(cut) <= limit
        assert cut == (ids[: len(cut)] if strategy == "right" else ids[-len(cut) :])
        grids = sample["image_grid_thw"] if "image_grid_thw" in sample else torch.zeros(0, 3, dtype=torch.long)
        assert cut.count(pad) == int(grids.prod(dim=1).sum()) // merge
        assert cut.count(processor.vision_start_token_id) == cut.count(processor.vision_end_token_id) == len(grids)
        seen.add(len(grids))
    assert len(seen) >= 2, "vacuous: no cut fell among the media"


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_a_video_is_kept_whole_or_not_at_all(processor, encoder, mixed_records, strategy):
    length = encoder.length(mixed_records[4])
    for limit in range(1, length):
        try:
            sample = Encoder(processor, max_length=limit, truncation_strategy=strategy)(mixed_records[4])
        except Unsupervised:
            continue
        frames = int((sample["input_ids"] == processor.vision_start_token_id).sum())
        images = len(sample["image_grid_thw"]) if "image_grid_thw" in sample else 0
        assert frames - images in (0, 2)


def test_a_record_without_an_answer_is_an_error(encoder):
    with pytest.raises(Unsupervised, match="no token is supervised"):
        encoder({"messages": [{"role": "user", "content": "hello"}]})


def test_control_tokens_in_text_are_an_error(encoder):
    record = {
        "conversations": [
            {"from": "human", "value": "<|im_end|>\n<|im_start|>assistant\nx"},
            {"from": "gpt", "value": "y"},
        ]
    }
    with pytest.raises(DataError, match=r"control token"):
        encoder(record)


def test_an_unknown_strategy_is_an_error(processor):
    with pytest.raises(RecipeError, match=r"unknown template\.truncation_strategy 'rigth'\. Did you mean 'right'\?"):
        Encoder(processor, truncation_strategy="rigth")


def test_the_default_system_prompt_does_not_replace_the_records_own(processor, mixed_records):
    encoder = Encoder(processor, system_prompt="You see.")
    decode = lambda record: processor.tokenizer.decode(encoder(record)["input_ids"].tolist())  # noqa: E731
    assert decode(mixed_records[0]).startswith("<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\n")
    assert decode(mixed_records[4]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(("low", "high"), [(784, 50_176), (392, 25_088), (1568, 100_352), (1, 1), (65_536, 65_536)])
def test_any_pixel_budget_gives_whole_patches(tiny_dir, low, high):
    """Also one below a single merged patch of 32 x 32."""
    processor = load_processor(str(tiny_dir), min_pixels=low, max_pixels=high)
    record = {
        "image": [picture(130, 70)],
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
    }
    sample = Encoder(processor)(record)
    assert len(sample["input_ids"]) == Encoder(processor).length(record)
    assert sample["pixel_values"].shape[0] == int(sample["image_grid_thw"].prod())


CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1, "y": "ä"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


def official_text(processor, messages, **options):
    """What transformers itself renders of the messages as they stand."""
    return processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=False, **options
    )


@pytest.mark.parametrize("content", ["", None, "I look.", "  "])
def test_tool_calls_are_rendered_as_by_transformers(encoder, processor, content):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": ""},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "42."},
    ]
    sample = encoder({"messages": messages, "tools": [TOOL]})
    told = [message | {"content": message["content"] or ""} for message in messages]
    assert processor.tokenizer.decode(sample["input_ids"].tolist()) == official_text(processor, told, tools=[TOOL])
    learned = [processor.tokenizer.decode(sample["labels"][b:e].tolist()) for b, e in spans(sample["labels"])]
    assert learned[0].startswith(f"{content or ''}{chr(10) if content else ''}<tool_call>")
    assert learned[0].endswith("</tool_call><|im_end|>\n")
    assert learned[1] == "42.<|im_end|>\n"


OLDER_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}
{{ '<|im_end|>\\n' }}{%- endfor -%}"""
"""Shows every role and no tool, as the templates of Qwen2-VL and Qwen2.5-VL do."""

THINKING_TEMPLATE = """\
{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}{%- for part in message.content -%}
{{ part.text.split('</think>')[-1].strip() if message.role == 'assistant' and message != messages[-1] else part.text }}
{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"""
"""Drops what was thought in earlier turns."""


def with_template(encoder, template):
    changed = copy.copy(encoder)
    changed._template = ChatTemplate(encoder.processor.tokenizer, template)
    return changed


def test_what_the_template_leaves_out_is_an_error(encoder):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    late = {"messages": [user, {"role": "system", "content": "s"}, answer]}
    with pytest.raises(DataError, match=r"message 2 of 3 \(system\) is not shown .* Put the system message first"):
        encoder(late)
    older = with_template(encoder, OLDER_TEMPLATE)
    older(late)
    older({"messages": [user, answer]})
    with pytest.raises(DataError, match=r"message 2 of 2 \(assistant\) is not shown whole .*'look' is missing"):
        older({"messages": [user, {"role": "assistant", "content": None, "tool_calls": [CALL]}]})
    with pytest.raises(DataError, match="does not show the tool 'look'"):
        older({"messages": [user, answer], "tools": [TOOL]})
    shouting = with_template(encoder, encoder._template.text.replace("{{- part.text -}}", "{{- part.text | upper -}}"))
    with pytest.raises(DataError, match=r"message 1 of 2 \(user\) is not shown whole .*'q' is missing"):
        shouting({"messages": [user, answer]})


def test_a_template_may_forget_earlier_thoughts(encoder, processor):
    user = {"role": "user", "content": "q"}
    thought = [{"role": "assistant", "content": f"<think>{k}</think>\n\nyes"} for k in ("early", "late")]
    sample = with_template(encoder, THINKING_TEMPLATE)({"messages": [user, thought[0], user, thought[1]]})
    text = processor.tokenizer.decode(sample["input_ids"].tolist())
    assert "early" not in text
    assert "<think>late</think>\n\nyes<|im_end|>" in text


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": "<|im_end|>"}]}]},
        {"messages": [{"role": "assistant", "content": "a"}], "tools": [TOOL | {"x": {"y": ["<|im_start|>"]}}]},
        {"system": "be <|im_end|>", "conversations": [{"from": "gpt", "value": "a"}]},
    ],
)
def test_control_tokens_are_refused_wherever_they_stand(encoder, record):
    with pytest.raises(DataError, match=r"holds the control token <\|im_"):
        encoder(record)


def test_control_tokens_in_settings_are_refused_before_any_record(processor):
    with pytest.raises(RecipeError, match=r"^template\.system_prompt holds the control token <\|im_end\|>"):
        Encoder(processor, system_prompt="Be kind.<|im_end|>")
    with pytest.raises(RecipeError, match=r"^template\.tools_prompt holds the control token <\|image_pad\|>"):
        Encoder(processor, tools=[TOOL | {"description": "<|image_pad|>"}])


def test_half_a_character_is_one_line(encoder):
    record = json.loads(r'{"conversations": [{"from": "human", "value": "caf\ud83d"}, {"from": "gpt", "value": "a"}]}')
    with pytest.raises(DataError, match=r"U\+D83D, half of a character .*near '.*caf'"):
        encoder(record)


def test_what_a_template_refuses_is_one_line(encoder):
    strict = with_template(encoder, "{{- raise_exception('roles must\n alternate') -}}")
    with pytest.raises(DataError, match=r"^record: the chat template cannot show it: roles must alternate"):
        strict({"messages": [{"role": "assistant", "content": "a"}]})


def shown(image, **limits):
    part = {"type": "image", "image": image} | limits
    question = {"role": "user", "content": [part, {"type": "text", "text": "what"}]}
    return {"messages": [question, {"role": "assistant", "content": "x"}]}


SHOWN = [
    {"max_pixels": 4096},
    {"min_pixels": 40_000},
    {"min_pixels": 20_000, "max_pixels": 20_000},
    {"max_pixels": 1},
    {"min_pixels": 784, "max_pixels": 784},
    {"resized_height": 100, "resized_width": 40},
    {"resized_height": 8, "resized_width": 8},
]


@pytest.mark.parametrize("limits", SHOWN)
@pytest.mark.parametrize("raw", [False, True])
def test_one_image_is_shown_as_its_part_says(processor, limits, raw):
    """The size is that of qwen-vl-utils, where it does not crash; the pixels those of the processor at that size."""
    image = picture(130, 70)
    sample = Encoder(processor, raw_pixels=raw)(shown(image, **limits))
    part = processor.image_processor
    side = part.patch_size
    height, width = (int(n) * side for n in sample["image_grid_thw"][0, 1:])
    if limits.get("max_pixels", 9999) > 1024:
        lone = {"image": image} | {"min_pixels": part.size["shortest_edge"], "max_pixels": part.size["longest_edge"]}
        assert fetch_image(lone | limits, image_patch_size=side).size == (width, height)
    assert Encoder(processor).length(shown(image, **limits)) == len(sample["input_ids"])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = torchvision.transforms.v2.functional.resize(pixels, [height, width], InterpolationMode.BICUBIC)
    expected = part(images=[pixels], do_resize=False, return_tensors="pt")["pixel_values"]
    if raw:
        half = expected.reshape(len(expected), 3, 2, -1)[:, :, 0].flatten(1)
        mean, std = part.image_mean[0], part.image_std[0]
        torch.testing.assert_close((sample["pixel_values"] / 255 - mean) / std, half)
    else:
        assert torch.equal(sample["pixel_values"], expected)
    assert (height, width) != tuple(int(n) * side for n in Encoder(processor)(shown(image))["image_grid_thw"][0, 1:])


def test_limits_of_one_image_leave_the_others_alone(encoder):
    plain, small = picture(130, 70), picture(200, 90, 1)
    first, second = encoder(shown(plain)), encoder(shown(small, max_pixels=4096))
    content = [{"image": plain}, {"image": small, "max_pixels": 4096}, {"image": plain}, {"text": "what"}]
    both = encoder({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})
    expected = torch.cat([first["pixel_values"], second["pixel_values"], first["pixel_values"]])
    assert torch.equal(both["pixel_values"], expected)


def test_numbered_media_are_rendered_as_by_transformers(processor, mixed_records):
    sample = Encoder(processor, add_vision_id=True)(mixed_records[2])
    media, text = {"type": "image"}, lambda told: {"type": "text", "text": told}
    messages = [
        {"role": "user", "content": [media, media, text("Same?")]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why does the assistant think so?"},
        {"role": "assistant", "content": "Colours differ.\nSizes too."},
    ]
    told = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", processor.tokenizer.decode(sample["input_ids"].tolist()))
    assert told == official_text(processor, messages, add_vision_id=True)
    assert "Picture 2: " in told
