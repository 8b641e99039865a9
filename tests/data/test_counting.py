"""The counter returns the number of encoded tokens, for any text and any tokenizer."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from qwenvl_ft.data.encode.counting import MAX_WORD, TokenCounter

PIECES = [
    *(chr(code) for code in range(128)),
    *("'s", "'LL", "  ", "\r\n", "\n\n", "abc", " The", "123", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<think>", "<|box_start|>", "ß", "图像", "e\u0301", "\u017f", "\u00a0", "🙂", "x" * (MAX_WORD + 1)),
]


def texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randrange(0, 16))) for _ in range(count)]


def encoded(tokenizer, strings):
    return [len(tokenizer.encode(text, add_special_tokens=False)) for text in strings]


@pytest.fixture
def tokenizer(processor):
    copied = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
    copied.no_padding()  # which a call of the processor may have left
    copied.no_truncation()
    return copied


def test_counts_equal_those_of_the_tokenizer(tokenizer):
    counter, strings = TokenCounter(tokenizer), texts(20_000)
    assert [counter(text) for text in strings] == encoded(tokenizer, strings)
    assert len(counter._words) > 1_000, "vacuous: no word was looked up"


def test_a_forgotten_word_is_counted_again(tokenizer, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.data.encode.counting.MAX_WORDS", 10)
    counter, strings = TokenCounter(tokenizer), texts(200)
    assert [counter(text) for text in strings] == encoded(tokenizer, strings)
    assert 0 < len(counter._words) <= 10


def add_token_that_strips(tokenizer):
    tokenizer.add_tokens([AddedToken("abc", lstrip=True, rstrip=True)])


def lower_case(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def split_at_spaces(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def cut_short(tokenizer):
    tokenizer.enable_truncation(3)


def special_tokens_as_text(tokenizer):
    tokenizer.encode_special_tokens = True


@pytest.mark.parametrize(
    "change", [add_token_that_strips, lower_case, split_at_spaces, cut_short, special_tokens_as_text]
)
def test_any_other_tokenizer_counts_itself(tokenizer, change):
    before, strings = TokenCounter(tokenizer), texts(2_000)
    known = [before(text) for text in strings]
    change(tokenizer)
    counter = TokenCounter(tokenizer)
    assert [counter(text) for text in strings] == encoded(tokenizer, strings)
    assert known != encoded(tokenizer, strings), "vacuous: the change changes nothing"
