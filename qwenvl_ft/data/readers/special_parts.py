r"""Which parts of a message's content are no text and no medium: reasoning, tool calls, their results, and tools.

```json
{"role": "assistant", "content": [{"type": "reasoning", "value": "It looks small."}, {"type": "text", "value": "5 mm."},
                                  {"type": "tool_call", "value": "{\"name\": \"measure\", \"arguments\": {}}"}]}
```
They become what plain messages have: a ``<think>`` block in the text, ``tool_calls``, messages of the role ``tool``,
and the record's ``tools``; the chat template writes all of them in its own form.
"""

import json
from collections.abc import Iterator
from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers.record_keys import parsed_calls
from qwenvl_ft.errors import DataError

KINDS = {
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "tool_call",
    "tool_result": "tool_result",
    "tool_response": "tool_result",
    "tools": "tools",
}
"""Type of a part -> what it is."""
VALUES = ("value", *KINDS, "text", "content")
"""Keys that may hold a part's value."""
Entry = dict[str, Any]


def expanded(record: dict[str, Any], source: Source) -> tuple[dict[str, Any], list[tuple[int, Any]]]:
    """Return a ``messages`` record and its messages, without special parts.

    Returns:
        The record, with the ``tools`` of its parts, and (number in the record, message) pairs; one message may become
        several.

    Raises:
        DataError: a part is malformed, or where it cannot be.
    """
    found: list[tuple[int, Any]] = []
    for number, entry in enumerate(record["messages"]):
        where = f"{source}: messages[{number}]"
        if not isinstance(entry, dict):
            found.append((number, entry))
            continue
        content = entry.get("content")
        if isinstance(content, dict):
            entry = entry | {"content": [content]}
        parts = entry["content"] if isinstance(entry.get("content"), (list, tuple)) else []
        if tools := [part for part in parts if _kind(part) == "tools"]:
            record = _with_tools(record, tools, where)
            entry = entry | {"content": [part for part in parts if _kind(part) != "tools"]}
            if not entry["content"]:
                continue
        if entry.get("reasoning_content"):
            entry = _with_reasoning_part(entry, where)
        if any(map(_kind, entry["content"]) if isinstance(entry.get("content"), (list, tuple)) else ()):
            found += [(number, message) for message in _messages(entry, where)]
        else:
            found.append((number, entry))
    return record, found


def _kind(part: Any) -> str | None:
    """Return what a special part is; None for any other part."""
    kind = part.get("type") if isinstance(part, dict) else None
    return KINDS.get(kind) if isinstance(kind, str) else None


def _value(part: Entry, where: str) -> Any:
    value = next((part[key] for key in VALUES if part.get(key) is not None), None)
    if value is None:
        raise DataError(f"{where} has type {part['type']!r} and no value. Write {{'type': ..., 'value': ...}}.")
    return value


def _with_tools(record: dict[str, Any], parts: list[Entry], where: str) -> dict[str, Any]:
    if len(parts) > 1 or record.get("tools"):
        raise DataError(f"{where} has a part of type 'tools', and the tools are given elsewhere too. Keep one.")
    return record | {"tools": _value(parts[0], where)}


def _with_reasoning_part(entry: Entry, where: str) -> Entry:
    """Return a message with its ``reasoning_content`` as the first part of its content."""
    content = entry.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    if any(_kind(part) == "reasoning" for part in parts):
        raise DataError(f"{where} has 'reasoning_content' and a part of type 'reasoning'. Keep one.")
    rest = {key: value for key, value in entry.items() if key != "reasoning_content"}
    return rest | {"content": [{"type": "reasoning", "value": entry["reasoning_content"]}, *parts]}


def _messages(entry: Entry, where: str) -> Iterator[Entry]:
    """Yield the messages that a message with special parts stands for: a tool result ends the part before it."""
    parts: list[Any] = []
    for place, part in enumerate(entry["content"]):
        if _kind(part) != "tool_result":
            parts.append((f"{where}.content[{place}]", part))
            continue
        if parts:
            yield _plain(entry, parts)
            parts = []
        yield {"role": "tool", "content": _result(_value(part, f"{where}.content[{place}]"))}
    if parts:
        yield _plain(entry, parts)


def _plain(entry: Entry, parts: list[tuple[str, Any]]) -> Entry:
    """Return a message whose reasoning is a text and whose calls are ``tool_calls``."""
    content: list[Any] = []
    calls: list[Entry] = []
    thought = ""
    for where, part in parts:
        kind = _kind(part)
        if kind is not None and entry.get("role") != "assistant":
            raise DataError(f"{where} has type {part['type']!r} and role {entry.get('role')!r}, not 'assistant'.")
        if kind == "tool_call":
            calls += parsed_calls(_value(part, where), where)
        elif calls:
            raise DataError(
                f"{where} follows a tool call, but the chat template writes calls after the text. Write it before "
                "them, or as a message of its own."
            )
        elif kind == "reasoning":
            thought = _thought(part, where, is_first=not content and not thought)
        else:
            content.append(part)
    if calls:
        entry = entry | {"tool_calls": [*(entry.get("tool_calls") or ()), *calls]}
    return entry | {"content": _with_thought(content, thought, parts[0][0])}


def _thought(part: Entry, where: str, *, is_first: bool) -> str:
    text = _value(part, where)
    if not is_first:
        raise DataError(f"{where} is reasoning after the answer began. Write it as the first part, once.")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} is reasoning, which must be a text, not {text!r:.80}.")
    inner: str = text.strip("\n")
    return f"<think>\n{inner}\n</think>"


def _with_thought(content: list[Any], thought: str, where: str) -> list[Any]:
    """Write the reasoning before the first text, as Qwen's templates do."""
    if not thought:
        return content
    text = next((part.get("text") or part.get("value") for part in content[:1] if isinstance(part, dict)), None)
    text = content[0] if content and isinstance(content[0], str) else text
    if not isinstance(text, str):
        return [{"type": "text", "text": thought}, *content]
    if "</think>" in text:
        raise DataError(f"{where} is reasoning, and the text has a <think> block too. Keep one.")
    return [{"type": "text", "text": f"{thought}\n\n{text.lstrip()}"}, *content[1:]]


def _result(value: Any) -> Any:
    """Return a tool's result as the content of a message: texts and lists of parts as they are, objects as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        return value
    return json.dumps(value, ensure_ascii=False)
