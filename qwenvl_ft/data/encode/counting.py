"""Counts the tokens of a text without encoding it: the counts of words seen before are looked up.

A byte-level BPE splits a text at its added tokens, then into words, and merges only within a word. So the token count
of a text is the sum over its words, and a data set has few distinct words. For any other tokenizer or text, the
tokenizer itself counts.
"""

import pickle
import re
from typing import Any

from tokenizers import Regex
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
"""Regexes by which the tokenizers of Qwen2-VL to Qwen3-VL, and of Qwen3.5, split a text into words."""
ASCII_SPLIT = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
"""What both find in ASCII text. Beyond it, Python and the tokenizer may use different versions of Unicode."""
MAX_WORDS = 1 << 18
"""Maximum number of words in the cache, about 30 MB."""
MAX_WORD = 32
"""Maximum length of a cached word, in characters."""


class TokenCounter:
    """Computes ``len(tokenizer.encode(text, add_special_tokens=False))``, several times as fast.

    Args:
        tokenizer: of the ``tokenizers`` package. One that splits differently is called for every text, and any
            tokenizer is called for text that is not ASCII.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        borders = sorted((token.content for token in added), key=len, reverse=True)
        self._encode = tokenizer.encode
        self._borders = re.compile("|".join(map(re.escape, borders)))
        self._words = _Words(tokenizer.encode)
        self._is_known = bool(borders) and _splits_as_known(tokenizer, added)

    def __call__(self, text: str) -> int:
        if not self._is_known:
            return self._encoded(text)
        parts = self._borders.split(text)
        return len(parts) - 1 + sum(self._part(part) for part in parts if part)

    def _part(self, text: str) -> int:
        if not text.isascii():
            return self._encoded(text)
        return sum(map(self._words.__getitem__, ASCII_SPLIT.findall(text)))

    def _encoded(self, text: str) -> int:
        return len(self._encode(text, add_special_tokens=False))


class _Words(dict[str, int]):
    """Cache of word -> number of tokens; a missing word is encoded."""

    def __init__(self, encode: Any) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> int:
        count = len(self._encode(word, add_special_tokens=False))
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= MAX_WORD:
            self[word] = count
        return count


def _splits_as_known(tokenizer: Any, added: Any) -> bool:
    """Return True if `ASCII_SPLIT` finds the words of ASCII text and added tokens always split a text."""
    if tokenizer.truncation or tokenizer.padding or tokenizer.encode_special_tokens:
        return False
    if any(token.normalized or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    return (
        _same(tokenizer.normalizer, None, NFC())
        and _same(tokenizer.pre_tokenizer, *(_splitting(split, trim) for split in SPLITS for trim in (False, True)))
        and type(tokenizer.model).__name__ == "BPE"
        and not tokenizer.model.dropout
    )


def _splitting(split: str, trim_offsets: bool) -> PreTokenizer:
    """Build a released tokenizer's pre-tokenizer."""
    words = Split(Regex(split), behavior="isolated", invert=False)
    return Sequence([words, ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets, use_regex=False)])


def _same(part: Any, *known: Any) -> bool:
    """Return True if a part of a tokenizer serialises to the same bytes as one of the known parts."""
    return pickle.dumps(part) in map(pickle.dumps, known)
