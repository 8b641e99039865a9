"""Builds the label mask: which tokens are supervised, that is, count in the loss.

The rule:

- Every assistant turn is supervised: its content, its tool calls, its end token ``<|im_end|>``, which teaches the
  model to stop, and the newline after the end token if the template writes one.
- Nothing else is: no system, user or tool turn, and no header (``<|im_start|>assistant`` and its newline), because
  the header is part of the prompt at inference.
- Nor is what the template writes after the header in a prompt. Those of thinking models write ``<think>`` and a newline
  there, or an empty think block if ``enable_thinking`` is false. So the reasoning of an answer is supervised with its
  ``</think>``, and the empty block that the template adds to an answer without reasoning is not.
- A turn's ``loss_weight`` multiplies the loss of its tokens in training; it does not change which are supervised.
- An assistant message with ``loss: false`` (or ``loss_weight: 0``) is context only. All of its turn is unsupervised,
  the end token included.
- A token that holds characters of both header and content is unsupervised. An answer that begins with a newline shares
  its first token with the header's newline; the official preprocessing leaves that token out too.
- Truncation keeps the mask of the tokens that remain. A turn cut on the right has no end token to learn.
- Position 0 has no label: the logits at position i predict token i + 1, so nothing predicts token 0. A sample whose
  other tokens are all unsupervised raises `Unsupervised`.

Turns are found by the ``<|im_start|>`` that the template writes, never by searching for a word. Records cannot hold
that token (`refuse_control`), so a user who writes "assistant" is not mistaken for one.

The steps: `find_turns` (characters of each message), `supervised_spans` (characters of the answers),
`supervised_tokens` (mask of the draft), `expand_labels` (labels of the sample).
Letters in shapes: D draft tokens, L tokens of the sample.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import IGNORE, Message, Source, Text
from qwenvl_ft.data.encode.draft import TURN, TURN_END, Draft, Unsupervised
from qwenvl_ft.data.encode.show import function_name
from qwenvl_ft.errors import DataError

Span = tuple[int, int]
"""Characters [begin, end) of the rendered text."""


def find_turns(text: str, messages: Sequence[Message], source: Source) -> list[Span]:
    """Locate each message in the rendered text, without its header and with its end token and newline.

    Neighbouring tool messages may share a turn; the span of a tool message is not exact.

    Raises:
        DataError: the template leaves out a message, one of its texts or one of its tool calls. It may change the
            white space around a text and drop an answer's ``<think>`` part, as thinking models do for earlier turns.
    """
    spans: list[Span] = []
    place = 0
    for number, message in enumerate(messages):
        where = f"{source}: message {number + 1} of {len(messages)} ({message.role})"
        if message.role != "tool":
            header = f"{TURN}{message.role}\n"
            begin = text.find(header, place)
            end = text.find(TURN_END, begin)
            if begin < 0 or end < 0:
                hint = " Put the system message first." if message.role == "system" and number else ""
                raise DataError(f"{where} is not rendered by the chat template as {header!r} ... {TURN_END!r}.{hint}")
            begin += len(header)
        else:
            follows = number > 0 and messages[number - 1].role == "tool"
            begin = place if follows else text.find(TURN, place) + len(TURN)
            end = len(text)
        place = begin
        for wanted in _required_texts(message):
            found = text.find(wanted, place, end)
            if found < 0:
                raise DataError(f"{where} is not rendered in full by the chat template: {wanted!r:.80} is missing.")
            place = found + len(wanted)
        if message.role != "tool":
            place = end + len(TURN_END)
        spans.append((begin, place + text.startswith("\n", place)))
    return spans


def _required_texts(message: Message) -> list[str]:
    """Return the texts of a message that the rendered text must hold, in order."""
    texts = [part.text for part in message.content if isinstance(part, Text)]
    if message.role == "assistant":
        texts = [text.rpartition("</think>")[2] for text in texts]
    return [text.strip() for text in texts if text.strip()] + [function_name(call) for call in message.tool_calls]


def supervised_spans(
    messages: Sequence[Message], turns: Sequence[Span], text: str = "", openings: Sequence[str] = ()
) -> list[Span]:
    """Select the turns of assistant messages, except those with ``loss: false``.

    Args:
        text: the rendered text.
        openings: what the template may write at the begin of an answer in a prompt, the longest first.
    """
    pairs = zip(messages, turns, strict=True)
    spans = [span for message, span in pairs if message.role == "assistant" and message.loss is not False]
    return [(begin + _opening_length(text, begin, openings), end) for begin, end in spans]


def _opening_length(text: str, begin: int, openings: Sequence[str]) -> int:
    return next((len(opening) for opening in openings if text.startswith(opening, begin)), 0)


def weights_of(messages: Sequence[Message]) -> list[float]:
    """Return the weight of each span of `supervised_spans`."""
    return [message.weight for message in messages if message.role == "assistant" and message.loss is not False]


def token_weights(encoding: Any, spans: Sequence[Span], weights: Sequence[float]) -> NDArray[np.float64] | None:
    """Return float64[D], the weight of each token in the loss; None if all are 1.

    Args:
        encoding: of the ``tokenizers`` package.
    """
    if all(weight == 1 for weight in weights):
        return None
    found = np.ones(len(encoding.ids))
    for (begin, end), weight in zip(spans, weights, strict=True):
        first, last = token_span(encoding, begin, end)
        found[first:last] = weight
    return found


def supervised_tokens(encoding: Any, spans: Iterable[Span]) -> NDArray[np.bool_]:
    """Return bool[D]: True for the tokens that lie wholly in one of the spans.

    Args:
        encoding: of the ``tokenizers`` package.
    """
    supervised = np.zeros(len(encoding.ids), dtype=bool)
    for begin, end in spans:
        first, last = token_span(encoding, begin, end)
        supervised[first:last] = True
    return supervised


def token_span(encoding: Any, begin: int, end: int) -> tuple[int, int]:
    """Return the tokens [first, last) that lie wholly in the characters [begin, end)."""
    token = encoding.char_to_token(begin)
    while token is None:  # normalisation merged this character into another
        begin += 1
        token = encoding.char_to_token(begin)
    first = token if encoding.token_to_chars(token)[0] >= begin else token + 1
    return first, encoding.char_to_token(end - 1) + 1


def require_supervised(draft: Draft, max_length: int | None) -> None:
    """Raise Unsupervised if no token after the first is supervised."""
    if not draft.supervised[1:].any():
        raise unsupervised(draft.source, max_length)


def unsupervised(source: Source, max_length: int | None) -> Unsupervised:
    """Return the error for a record without a supervised token."""
    return Unsupervised(
        f"{source}: no token is supervised. Each record needs an assistant turn"
        + (" within template.max_length." if max_length is not None else ".")
    )


def expand_labels(
    ids: NDArray[np.int64], supervised: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the labels of a sample: the token itself where supervised, else `IGNORE`; always `IGNORE` at 0.

    Args:
        ids: [L], after media are expanded.
        supervised: [D]
        counts: [D], tokens that each draft token becomes.

    Returns:
        int64[L]
    """
    labels = np.where(np.repeat(supervised, counts), ids, IGNORE)
    labels[:1] = IGNORE
    return labels
