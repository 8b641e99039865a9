"""A sample's tokens as a reader sees them: text piece by piece, each medium as one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.encode.draft import IMAGE_PAD, VIDEO_PAD

SPLIT_CHARACTER = "\ufffd"
"""What a tokenizer decodes a part of a character to."""
LONGEST_CHARACTER = 8
"""Tokens that one character (of several code points) may be spread over."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that are shown as one: a text's token, those that share a character, or all of an image."""

    ids: tuple[int, ...]
    """Of a medium only one, which stands ``count`` times."""
    count: int
    learned: bool
    text: str
    """Decoded; empty for a medium."""
    kind: str
    """``text``, ``special``, ``image`` or ``video``."""


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[Piece]:
    """All tokens in order; their ids and counts add up to the sample."""
    return list(_pieces(list(ids), list(labels), tokenizer))


def _pieces(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[Piece]:
    media = dict(zip(tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD]), ("image", "video"), strict=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special or added.content}
    start = 0
    while start < len(ids):
        token, learned = ids[start], labels[start] != IGNORE
        end = start + 1
        if token in media:
            while end < len(ids) and ids[end] == token:
                end += 1
            yield Piece((token,), end - start, learned, "", media[token])
        elif token in special:
            yield Piece((token,), 1, learned, tokenizer.convert_ids_to_tokens(token), "special")
        else:
            text = tokenizer.decode([token])
            limit = min(len(ids), start + LONGEST_CHARACTER)
            while SPLIT_CHARACTER in text and end < limit and ids[end] not in special:
                if (labels[end] != IGNORE) != learned:
                    break
                end += 1
                text = tokenizer.decode(ids[start:end])
            if SPLIT_CHARACTER in text:  # the text itself has one, or is cut within a character
                end, text = start + 1, tokenizer.decode([token])
            yield Piece(tuple(ids[start:end]), 1, learned, text, "text")
        start = end


def learned_texts(told: Sequence[Piece]) -> list[str]:
    """The text of each run of learned tokens, without special ones."""
    texts: list[str] = []
    before = False
    for piece in told:
        if piece.learned and not before:
            texts.append("")
        if piece.learned and piece.kind == "text":
            texts[-1] += piece.text
        before = piece.learned
    return texts


def texts_before_media(told: Sequence[Piece], kind: str = "image") -> list[str]:
    """For each image, the text between it and the medium before it, without special tokens."""
    found, text = [], ""
    for piece in told:
        if piece.kind in ("image", "video"):
            if piece.kind == kind:
                found.append(text)
            text = ""
        elif piece.kind == "text":
            text += piece.text
    return found
