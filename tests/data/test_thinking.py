"""Thinking models: what their chat template writes into a prompt is not supervised, and everything after it is."""

import pytest
import torch
from cases import make_kind

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.show import ChatTemplate
from qwenvl_ft.model.load import load_processor

TURN, END = "<|im_start|>", "<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return Encoder(load_processor(make_kind(tmp_path_factory.mktemp("thinking"), "qwen3_5")))


def record(*texts):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]}


def text_of(encoder, sample):
    return encoder.processor.tokenizer.decode(sample["input_ids"])


def supervised(encoder, sample):
    labels = sample["labels"]
    return encoder.processor.tokenizer.decode(labels[labels != -100])


def test_an_empty_think_block_is_part_of_the_prompt(thinking):
    sample = thinking(record("How many?", "Two."))
    assert text_of(thinking, sample) == f"{TURN}user\nHow many?{END}{TURN}assistant\n{EMPTY}Two.{END}"
    assert supervised(thinking, sample) == f"Two.{END}"
    prompt = thinking.prompt(record("How many?", "Two."))
    assert text_of(thinking, prompt) == f"{TURN}user\nHow many?{END}{TURN}assistant\n{EMPTY}"
    unseen = (sample["labels"] != -100).nonzero()[0]
    assert torch.equal(sample["input_ids"][:unseen], prompt["input_ids"]), "what is supervised begins where it is asked"


def test_reasoning_is_supervised_with_its_end(thinking):
    answer = "<think>\nOne and one.\n</think>\n\nTwo."
    sample = thinking(record("How many?", answer))
    assert supervised(thinking, sample) == f"One and one.\n</think>\n\nTwo.{END}"
    asking = Encoder(thinking.processor, enable_thinking=True)
    prompt = asking.prompt(record("How many?", answer))
    assert text_of(asking, prompt).endswith(f"{TURN}assistant\n<think>\n")
    assert torch.equal(sample["input_ids"][: len(prompt["input_ids"])], prompt["input_ids"])


def test_earlier_answers_have_no_think_block_and_lose_their_reasoning(thinking):
    sample = thinking(record("How many?", "<think>\nOne and one.\n</think>\n\nTwo.", "And now?", "Three."))
    assert text_of(thinking, sample) == (
        f"{TURN}user\nHow many?{END}{TURN}assistant\nTwo.{END}"
        f"{TURN}user\nAnd now?{END}{TURN}assistant\n{EMPTY}Three.{END}"
    )
    assert supervised(thinking, sample) == f"Two.{END}Three.{END}"


def test_an_answer_that_says_think_itself_stays_supervised(encoder):
    """Qwen3-VL's template writes nothing into a prompt, so a record's own think block is learnt in full."""
    answer = f"{EMPTY}Two."
    assert supervised(encoder, encoder(record("How many?", answer))) == f"{answer}{END}"
    assert encoder._template.openings == ("",)


def test_a_template_that_always_asks_for_reasoning(encoder):
    """As that of Qwen3-VL Thinking, whose prompts end with ``<think>`` and a newline whatever is asked."""
    text = encoder._template.text
    text = text.replace(
        "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}", "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
    )
    assert text != encoder._template.text
    asking = Encoder(encoder.processor)
    asking._template = ChatTemplate(encoder.processor.tokenizer, text)
    assert asking._template.openings == ("<think>\n",)
    sample = asking(record("How many?", "<think>\nOne and one.\n</think>\n\nTwo."))
    assert supervised(asking, sample) == f"One and one.\n</think>\n\nTwo.{END}"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [
                {"role": "system", "content": " Be brief. "},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat? "}]},
            ],
            f"{TURN}system\nBe brief.{END}{TURN}user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat?{END}",
        ),
        (
            [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": "I look.",
                    "reasoning_content": " It may rain. ",
                    "tool_calls": [{"function": {"name": "sky", "arguments": {"at": "Rome", "days": [1, 2]}}}],
                },
                {"role": "tool", "content": "sun"},
                {"role": "tool", "content": "rain"},
            ],
            f"{TURN}user\nWeather?{END}{TURN}assistant\n<think>\nIt may rain.\n</think>\n\nI look.\n\n<tool_call>\n"
            "<function=sky>\n<parameter=at>\nRome\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n</function>\n"
            f"</tool_call>{END}{TURN}user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n"
            f"</tool_response>{END}",
        ),
    ],
    ids=["system and image", "tools"],
)
def test_the_template_renders_what_the_released_one_does(thinking, messages, expected):
    """The expected texts follow the rules of the template of Qwen3.5-35B-A3B."""
    assert thinking.processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_lengths_are_counted_without_encoding(thinking, mixed_records):
    for number, mixed in enumerate(mixed_records):
        assert thinking.length(mixed) == len(thinking(mixed)["input_ids"]), number
    from qwenvl_ft.data.encode.counting import TokenCounter

    assert TokenCounter(thinking.processor.tokenizer.backend_tokenizer)._is_known


def test_a_batch_of_the_family_has_the_same_layout(thinking, encoder, mixed_records):
    batches = [QwenVLCollator()([each(mixed) for mixed in mixed_records]) for each in (thinking, encoder)]
    assert batches[0].keys() == batches[1].keys()
