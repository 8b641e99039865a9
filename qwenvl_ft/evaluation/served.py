"""Does a server answer as the trained model does? Asks both the same prompts greedily, and compares token by token.

The server gets the messages of a record (asked.py). It renders them by its own chat template and resizes media by its
own limits, as it does for any client. The trained model is run by transformers, on prompts that are encoded as in
training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from qwenvl_ft.data.conversation import Conversation, Video
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError, one_line
from qwenvl_ft.evaluation.asked import Asked, NotAsked, asked_of
from qwenvl_ft.evaluation.differences import first_difference, prompt_difference
from qwenvl_ft.evaluation.generate import STOP_TOKENS, greedy_tokens

WAIT_SECONDS = 600
TRUST = "--trust-request-mm-kwargs"
"""vLLM (0.32) refuses ``media_io_kwargs`` of a request without this flag, and its error names the flag."""


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
        self._refusal = ""

    def require_frames_taken(self) -> None:
        """Check whether frames of a video that a client has chosen can be sent.

        Raises:
            NotAsked: the server is not vLLM, or has refused such frames in an earlier request.
        """
        if self.maker != "vllm":
            self._refusal = (
                "only vLLM takes the frames of videos that training shows; this server is "
                f"{self.maker or 'another one'}, and would sample a video by its own rules"
            )
        if self._refusal:
            raise NotAsked(self._refusal)

    def ask(self, asked: Asked, max_new_tokens: int, tokenizer: Any) -> Reply:
        """Return the greedy answer to a question; see `require_frames_taken` for one with videos.

        Raises:
            NotAsked: the server does not take the frames of its videos.
            CheckpointError: the server refuses, or its reply is not one of the API.
        """
        frames, tools = asked.media_io_kwargs, asked.tools
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
        if tools and self.maker == "vllm":  # which shows tools all the same, and wants a parser for any other choice
            body["tool_choice"] = "none"
        try:
            reply = self._call("chat/completions", body)
        except CheckpointError as error:
            if frames and TRUST in str(error):
                self._refusal = f"start vLLM with {TRUST}, or it takes no frames of videos that a client has chosen"
                raise NotAsked(self._refusal) from error
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
        try:
            if conversation.media(Video):  # before any frame is decoded
                server.require_frames_taken()
            reply = server.ask(asked_of(conversation, encoder), max_new_tokens, tokenizer)
        except NotAsked as reason:
            left.append((source, str(reason)))
            continue
        sample = encoder.prompt(conversation)
        tokens, logprobs = greedy_tokens(model, encoder.processor, sample, max_new_tokens)
        own = comparable(tokens, reply, tokenizer, stops)
        first = first_difference(own, reply.tokens, stops)
        alike = len(own) if first is None else first
        gap = 0.0 if first is None else float("inf")
        if first is not None and first < len(reply.tokens) and own[: first + 1] == tokens[: first + 1]:
            gap = float(logprobs[first, own[first]] - logprobs[first, reply.tokens[first]])
        pairs = enumerate((reply.logprobs or [])[:alike]) if own == tokens else ()
        differences = [abs(given - float(logprobs[place, tokens[place]])) for place, given in pairs]
        prompt = prompt_difference(sample["input_ids"].tolist(), reply.prompt, reply.prompt_length, tokenizer)
        largest = max(differences, default=None)
        agrees = not prompt and (first is None or is_tie(gap, largest, tie_margin))
        cause = prompt
        if not agrees and not prompt and _answers_as_base(model, encoder, sample, reply, stops, max_new_tokens):
            cause = "the server answers as the base model does: it does not apply the adapter"
        found.append(Compared(source, len(own), first, gap, largest, cause, agrees))
    return found, left


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
