"""Groups a sample's tokens into readable pieces: text token by token, each medium as one piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.encode.draft import IMAGE_PAD, VIDEO_PAD

SPLIT_CHARACTER = "\ufffd"
"""Character to which a tokenizer decodes an incomplete UTF-8 sequence."""
LONGEST_CHARACTER = 8
"""Maximum number of tokens that one character (of several code points) may be spread over."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens shown as one: a text token, tokens that share a character, or all tokens of a medium."""

    ids: tuple[int, ...]
    """Token ids; of a medium a single id, which occurs ``count`` times."""
    count: int
    supervised: bool
    text: str
    """Decoded text; empty for a medium."""
    kind: str
    """``text``, ``special``, ``image`` or ``video``."""


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[Piece]:
    """Return the pieces of a sample in order; together they hold all of its tokens."""
    return list(_pieces(list(ids), list(labels), tokenizer))


def _pieces(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[Piece]:
    media = dict(zip(tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD]), ("image", "video"), strict=True))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special or added.content}
    start = 0
    while start < len(ids):
        token, supervised = ids[start], labels[start] != IGNORE
        end = start + 1
        if token in media:
            while end < len(ids) and ids[end] == token:
                end += 1
            yield Piece((token,), end - start, supervised, "", media[token])
        elif token in special:
            yield Piece((token,), 1, supervised, tokenizer.convert_ids_to_tokens(token), "special")
        else:
            text = tokenizer.decode([token])
            limit = min(len(ids), start + LONGEST_CHARACTER)
            while SPLIT_CHARACTER in text and end < limit and ids[end] not in special:
                if (labels[end] != IGNORE) != supervised:
                    break
                end += 1
                text = tokenizer.decode(ids[start:end])
            if SPLIT_CHARACTER in text:  # the text itself contains it, or was cut within a character
                end, text = start + 1, tokenizer.decode([token])
            yield Piece(tuple(ids[start:end]), 1, supervised, text, "text")
        start = end


def supervised_texts(sequence: Sequence[Piece]) -> list[str]:
    """Return the text of each run of supervised tokens, without special tokens."""
    texts: list[str] = []
    before = False
    for piece in sequence:
        if piece.supervised and not before:
            texts.append("")
        if piece.supervised and piece.kind == "text":
            texts[-1] += piece.text
        before = piece.supervised
    return texts


def texts_before_media(sequence: Sequence[Piece], kind: str = "image") -> list[str]:
    """Return, for each image, the text between the previous medium and it, without special tokens."""
    found, text = [], ""
    for piece in sequence:
        if piece.kind in ("image", "video"):
            if piece.kind == kind:
                found.append(text)
            text = ""
        elif piece.kind == "text":
            text += piece.text
    return found
