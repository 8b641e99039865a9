"""Exactly the answers are supervised, each with its end token and newline."""

import pytest
from label_cases import spans
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from qwenvl_ft.data.conversation import Conversation, Message, Source, Text
from qwenvl_ft.data.encode.draft import Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.labels import supervised_tokens


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
    """The supervised tokens and those before them decode to the whole conversation."""
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


def test_a_record_without_an_answer_is_an_error(encoder):
    with pytest.raises(Unsupervised, match="no token is supervised"):
        encoder({"messages": [{"role": "user", "content": "hello"}]})


def test_labels_token_by_token(encoder, processor):
    """The rule of encode/labels.py by hand: headers and other turns are not supervised, end token and newline are."""
    record = {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]}
    sample = encoder(record)
    tokens = [processor.tokenizer.decode([token]) for token in sample["input_ids"].tolist()]
    system = ["<|im_start|>", *"system", "\n", "s", "<|im_end|>", "\n"]
    assert "".join(tokens[: tokens.index("<|im_end|>") + 2]) == "".join(system)
    assert tokens[-4:] == ["\n", "a", "<|im_end|>", "\n"]
    assert sample["labels"].tolist() == [-100] * (len(tokens) - 3) + sample["input_ids"][-3:].tolist()


def test_a_token_of_header_and_answer_is_not_supervised():
    """A tokenizer may join the header's newline with those that the answer begins with."""
    tokenizer = Tokenizer(WordLevel({"h": 0, "\n": 1, "\n\n": 2, "x": 3}, unk_token="h"))
    tokenizer.pre_tokenizer = Split(Regex("\n+|[^\n]"), "isolated")
    joined, single = tokenizer.encode("h\n\nx"), tokenizer.encode("h\nx")
    assert (joined.ids, single.ids) == ([0, 2, 3], [0, 1, 3])
    assert supervised_tokens(joined, [(2, 4)]).tolist() == [False, False, True]
    assert supervised_tokens(single, [(1, 3)]).tolist() == [False, True, True], "a newline of its own is supervised"


def test_truncation_keeps_the_labels_of_the_tokens_that_remain(encoder, processor):
    """The first token has no label even where truncation puts an answer there."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one two three four"}]
    sample = encoder({"conversations": turns})
    length, ((begin, _),) = len(sample["labels"]), spans(sample["labels"])
    for limit in range(begin + 1, length):
        right = Encoder(processor, max_length=limit, truncation_strategy="right")({"conversations": turns})
        assert right["labels"].tolist() == sample["labels"][:limit].tolist()
    for limit in range(2, length):
        left = Encoder(processor, max_length=limit, truncation_strategy="left")({"conversations": turns})
        assert left["labels"].tolist() == [-100, *sample["labels"][length - limit + 1 :].tolist()]
    with pytest.raises(Unsupervised, match=r"within template\.max_length"):
        Encoder(processor, max_length=1, truncation_strategy="left")({"conversations": turns})
