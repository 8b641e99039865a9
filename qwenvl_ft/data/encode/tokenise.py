"""Turns rendered text into tokens, or only counts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.counting import TokenCounter
from qwenvl_ft.errors import DataError


class TextTokenizer:
    """Encodes or counts the tokens of a text, and names the record if the text is not valid Unicode.

    Args:
        tokenizer: of the ``tokenizers`` package.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer
        self._count = TokenCounter(tokenizer)

    def encode(self, text: str, source: Source) -> Any:
        """Return the ``tokenizers.Encoding`` of a text.

        Raises:
            DataError: the text holds a lone surrogate.
        """
        with _lone_surrogates_named(text, source):
            return self.backend.encode(text, add_special_tokens=False)

    def count(self, text: str, source: Source) -> int:
        """Return the number of tokens of a text, several times as fast as `encode`.

        Raises:
            DataError: the text holds a lone surrogate.
        """
        with _lone_surrogates_named(text, source):
            return self._count(text)


@contextmanager
def _lone_surrogates_named(text: str, source: Source) -> Iterator[None]:
    """Replace the tokenizer's error about a lone surrogate with a DataError that shows where it is."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        require_unicode(text, source)
        raise


def require_unicode(text: str, source: Source) -> None:
    """Raise DataError if a text holds a lone surrogate; the message shows where it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone, place = text[error.start], error.start
        raise DataError(
            f"{source}: the text holds U+{ord(lone):04X}, half of a character (a lone surrogate), near "
            f"{text[max(0, place - 20) : place]!r}. Correct the record."
        ) from None
