"""Does a server answer as the trained model does? Asks both the same prompts greedily, and compares token by token.

The server gets the messages of a record (asked.py). It renders them by its own chat template and resizes media by its
own limits, as it does for any client. The trained model is run by transformers, on prompts that are encoded as in
training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from qwenvl_ft.data.conversation import Conversation
from qwenvl_ft.data.encode.draft import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError, one_line
from qwenvl_ft.evaluation.asked import Asked, NotAsked, asked_of
from qwenvl_ft.evaluation.generate import STOP_TOKENS, greedy_tokens

WAIT_SECONDS = 600
TRUST = "--trust-request-mm-kwargs"
"""vLLM refuses ``media_io_kwargs`` of a request without this flag (0.32)."""
PADS = {IMAGE_PAD: "images", VIDEO_PAD: "videos"}
GROUP = re.compile(rf"<(\d+\.\d) seconds>{re.escape(VISION_START + VIDEO_PAD + VISION_END)}")
"""A group of frames in a prompt whose pads are not repeated, with its time in seconds."""


@dataclass(frozen=True)
class Reply:
    """A server's answer to one prompt."""

    tokens: list[int]
    """With a stop token at the end unless the answer was cut at its longest."""
    logprobs: list[float] | None
    """Of ``tokens``, as far as the server gives them."""
    prompt: list[int] | None
    """Tokens of the prompt that the server has rendered, if it says so."""
    prompt_length: int | None
    from_text: bool = False
    """True if the server gives no token ids: ``tokens`` are those of its text, which other tokens may have written."""


@dataclass(frozen=True)
class Compared:
    """Result for one record."""

    source: str
    tokens: int
    """Number of tokens of the trained model's answer."""
    first: int | None
    """Place of the first token that differs; None if none does."""
    gap: float
    """By how much the trained model prefers its own token there to the server's, in nats."""
    logprob_gap: float | None
    """Largest difference of log-probabilities over the tokens before it, in nats."""
    cause: str
    """What explains a difference; empty if nothing is known."""
    agrees: bool
    """True if no token differs, or the two first ones are a tie; and the prompts do not differ."""


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, name: str | None = None, folder: str = "") -> None:
        """Find the served model.

        Args:
            url: of the API, such as ``http://127.0.0.1:8000/v1``.
            name: of the served model; None takes the only one, or the one that was loaded from ``folder``.

        Raises:
            CheckpointError: the server does not answer, or serves several models.
        """
        self.url = url.rstrip("/")
        self.name = name or self._only_model(folder.rstrip("/"))

    def ask(self, asked: Asked, max_new_tokens: int, tokenizer: Any, tools: list[Any] | None = None) -> Reply:
        """Return the greedy answer to a question.

        Raises:
            NotAsked: the server does not take the frames of its videos.
            CheckpointError: the server refuses, or its reply is not one of the API.
        """
        frames = asked.media_io_kwargs
        if frames and self.maker != "vllm":
            raise NotAsked(
                f"only vLLM takes the frames that training shows; this server is {self.maker or 'another one'}, and "
                "would sample a video by its own rules"
            )
        body = {
            "model": self.name,
            "messages": asked.messages,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "repetition_penalty": 1.0,  # a generation_config.json that a server reads may set others
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": True,
            "top_logprobs": 1,
            "return_token_ids": True,  # vLLM and SGLang
        }
        body |= ({"tools": tools} if tools else {}) | ({"media_io_kwargs": frames} if frames else {})
        try:
            reply = self._call("chat/completions", body)
        except CheckpointError as error:
            if frames and "media_io_kwargs" in str(error):
                raise NotAsked(f"start vLLM with {TRUST}, or it takes no frames that a client has chosen") from error
            raise
        try:
            return _read_reply(reply, tokenizer)
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"the reply of {self.url} is not one of the OpenAI API: {type(error).__name__} {error}"
            ) from error

    @cached_property
    def maker(self) -> str:
        """Who made the server, by its list of models: ``vllm``, ``sglang``, ...; empty if it does not say so."""
        makers = {str(entry.get("owned_by") or "") for entry in self._models}
        return makers.pop() if len(makers) == 1 else ""

    @cached_property
    def _models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self._call("models")["data"]
        return models

    def _only_model(self, folder: str) -> str:
        names = [entry["id"] for entry in self._models]
        own = [entry["id"] for entry in self._models if folder and folder in (entry.get("root"), entry["id"])]
        chosen = own or names
        if len(chosen) != 1:
            raise CheckpointError(f"{self.url} serves {', '.join(names) or 'nothing'}. Choose one: --served-name NAME.")
        return str(chosen[0])

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data=data, headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=WAIT_SECONDS) as reply:
                return json.load(reply)
        except HTTPError as error:
            said = one_line(error.read().decode(errors="replace"))
            raise CheckpointError(f"{request.full_url} answered {error.code}: {said}") from error
        except (URLError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{request.full_url} does not answer: {one_line(error)}. Give the URL of an OpenAI-compatible server: "
                "--url http://127.0.0.1:8000/v1."
            ) from error


def compare(
    model: Any,
    encoder: Encoder,
    server: Server,
    conversations: Iterable[Conversation],
    *,
    max_new_tokens: int = 64,
    tie_margin: float = 0.1,
) -> tuple[list[Compared], list[tuple[str, str]]]:
    """Ask both about each conversation; see `asked_of`.

    Args:
        tie_margin: two tokens whose log-probabilities are closer than this, in nats, are a tie: rounding decides.

    Returns:
        The results, and (source, reason) of each record that the server could not be asked about.

    Raises:
        CheckpointError: see `Server`.
        DataError: a record cannot be encoded.
    """
    tokenizer = encoder.processor.tokenizer
    stops = {tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS}
    found: list[Compared] = []
    left: list[tuple[str, str]] = []
    for conversation in conversations:
        source = str(conversation.source)
        sample = encoder.prompt(conversation)
        try:
            reply = server.ask(asked_of(conversation, encoder), max_new_tokens, tokenizer, encoder.tools)
        except NotAsked as reason:
            left.append((source, str(reason)))
            continue
        tokens, logprobs = greedy_tokens(model, encoder.processor, sample, max_new_tokens)
        own = comparable(tokens, reply, tokenizer, stops)
        first = first_difference(own, reply.tokens, stops)
        alike = len(own) if first is None else first
        gap = 0.0 if first is None else float("inf")
        if first is not None and first < len(reply.tokens) and own[: first + 1] == tokens[: first + 1]:
            gap = float(logprobs[first, own[first]] - logprobs[first, reply.tokens[first]])
        pairs = enumerate((reply.logprobs or [])[:alike]) if own == tokens else ()
        differences = [abs(given - float(logprobs[place, tokens[place]])) for place, given in pairs]
        prompt = prompt_difference(sample["input_ids"].tolist(), reply, tokenizer)
        largest = max(differences, default=None)
        agrees = not prompt and (first is None or is_tie(gap, largest, tie_margin))
        cause = prompt
        if not agrees and not prompt and _answers_as_base(model, encoder, sample, reply, stops, max_new_tokens):
            cause = "the server answers as the base model does: it does not apply the adapter"
        found.append(Compared(source, len(own), first, gap, largest, cause, agrees))
    return found, left


def first_difference(ours: Sequence[int], theirs: Sequence[int], stops: set[int]) -> int | None:
    """Return the place of the first token that differs; all stop tokens are the same one.

    Example:
        ``[5, 6, 7]`` and ``[5, 8]`` differ at 1; ``[5]`` and ``[5, 6]`` at 1.
    """
    for place, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other and not (own in stops and other in stops):
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def comparable(tokens: list[int], reply: Reply, tokenizer: Any, stops: set[int]) -> list[int]:
    """Return the trained model's tokens as they compare with a reply's: those of their text, if it has only a text."""
    if not reply.from_text:
        return tokens
    text = tokenizer.decode([token for token in tokens if token not in stops], skip_special_tokens=True)
    stop = tokens[-1:] if tokens and tokens[-1] in stops else []
    return [*tokenizer.encode(text, add_special_tokens=False), *stop]


def is_tie(gap: float, logprob_gap: float | None, margin: float) -> bool:
    """Return True if rounding may have decided between two tokens: they and those before are about as likely."""
    return gap <= margin and (logprob_gap or 0.0) <= margin


def prompt_difference(ours: list[int], reply: Reply, tokenizer: Any) -> str:
    """Return how the prompt that the server has rendered differs from the trained model's; empty if it does not."""
    count, theirs = reply.prompt_length, reply.prompt
    if theirs is None:
        if count is None or count == len(ours):
            return ""
        return (
            f"the server's prompt has {count} tokens, the trained model's {len(ours)}: it has other pixel limits, "
            "another chat template, another system prompt or other frames of a video"
        )
    pads = {tokenizer.convert_tokens_to_ids(pad): name for pad, name in PADS.items()}
    own_text, other_text = _without_repeats(ours, pads), _without_repeats(theirs, pads)
    if own_text != other_text:
        place = first_difference(own_text, other_text, set()) or 0
        own, other = (repr(tokenizer.decode(text[place : place + 8])) for text in (own_text, other_text))
        return _frame_difference(tokenizer.decode(own_text), tokenizer.decode(other_text)) or (
            f"the server renders another prompt (chat template, or the system prompt of training): {other} where the "
            f"trained model has {own}"
        )
    for pad, name in pads.items() if count != len(ours) else ():
        own_count, other_count = ours.count(pad), theirs.count(pad)
        if own_count != other_count:
            return f"the server has other pixel limits: {other_count} tokens of {name}, not {own_count}"
    return ""


def _frame_difference(own: str, other: str) -> str:
    """Return how two prompts differ if only the groups of frames of their videos do; else an empty text.

    Args:
        own, other: without repeated pads.
    """
    inner = re.sub(f"{re.escape(VISION_START)}((?:{GROUP.pattern})+){re.escape(VISION_END)}", r"\1", other)
    if inner == own:
        return (
            "the server writes a second pair of vision tokens around each video, as transformers does since 5.10: use "
            "the chat template of qwenvl-ft export --for vllm"
        )
    if GROUP.sub("", inner) != GROUP.sub("", own):
        return ""
    times, others = GROUP.findall(own), GROUP.findall(inner)
    shown = ", ".join(f"{time} s" for time in others[:4]), ", ".join(f"{time} s" for time in times[:4])
    return (
        f"the server shows other frames of a video, or at other times: {len(others)} groups at {shown[0]}, where the "
        f"trained model has {len(times)} at {shown[1]}"
    )


def _without_repeats(tokens: list[int], pads: Collection[int]) -> list[int]:
    before = [-1, *tokens]
    return [token for token, last in zip(tokens, before, strict=False) if token != last or token not in pads]


def _answers_as_base(
    model: Any, encoder: Encoder, sample: Any, reply: Reply, stops: set[int], max_new_tokens: int
) -> bool:
    if not hasattr(model, "disable_adapter"):
        return False
    with model.disable_adapter():
        tokens, _ = greedy_tokens(model, encoder.processor, sample, max_new_tokens)
    own = comparable(tokens, reply, encoder.processor.tokenizer, stops)
    return first_difference(own, reply.tokens, stops) is None


def _read_reply(reply: dict[str, Any], tokenizer: Any) -> Reply:
    choice = reply["choices"][0]
    tokens, from_text = choice.get("token_ids"), False
    given = (choice.get("logprobs") or {}).get("content")
    logprobs = None if given is None else [float(entry["logprob"]) for entry in given]
    if tokens is None:
        tokens, from_text = tokenizer.encode(choice["message"]["content"] or "", add_special_tokens=False), True
    stops = [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
    if choice.get("finish_reason") == "stop" and (not tokens or tokens[-1] not in stops):
        tokens = [*tokens, stops[0]]
    prompt = reply.get("prompt_token_ids") or choice.get("prompt_token_ids")
    length = (reply.get("usage") or {}).get("prompt_tokens")
    return Reply([int(token) for token in tokens], logprobs, prompt, length, from_text)
