"""ShareGPT's further roles: calls of tools, what they gave back, and other names of the two who speak.

```json
{"tools": [{"type": "function", "function": {"name": "measure"}}],
 "conversations": [{"from": "human", "value": "How long?"},
                   {"from": "function_call", "value": "{\"name\": \"measure\", \"arguments\": {}}"},
                   {"from": "observation", "value": "12 mm"}, {"from": "gpt", "value": "12 mm."}]}
```
Turns of people and models alone are ``conversations`` or ``messages`` already. A value of ``function_call`` is one
call or a list of them, as JSON. Both ``from`` and ``value`` and ``role`` and ``content`` are understood.
"""

import json
from typing import Any

from qwenvl_ft.data import conversation
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import conversations
from qwenvl_ft.errors import DataError, hint

LISTS = ("conversations", "messages")
SAME = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Role of a turn -> role of a message."""
CALLS = ("function_call", "tool_call")
"""Roles whose turns are an assistant's calls."""
FURTHER = {
    "conversations": {*SAME, *CALLS}.difference(conversations.ROLES),
    "messages": {*SAME, *CALLS}.difference(conversation.ROLES),
}
"""Key of the turns -> roles that the plain format lacks."""


def matches(record: dict[str, Any]) -> bool:
    """Whether a turn has a role that the plain formats lack, or ``conversations`` are written as messages."""
    for key in LISTS:
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            roles = (_role(turn) for turn in turns if isinstance(turn, dict))
            further = any(isinstance(role, str) and role in FURTHER[key] for role in roles)
            return further or (key == "conversations" and "role" in turns[0])
    return False


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """The record as ``messages``.

    Raises:
        DataError: a turn has no known role, or a call is no JSON.
    """
    key = next(key for key in LISTS if isinstance(record.get(key), list))
    messages = [_message(turn, f"{source}: {key}[{number}]") for number, turn in enumerate(record[key])]
    return {name: value for name, value in record.items() if name not in LISTS} | {"messages": messages}


def _role(turn: dict[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be {{'from': ..., 'value': text}}, it is {turn!r:.80}.")
    role = _role(turn)
    content = turn.get("value", turn.get("content"))
    kept = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
    if role in CALLS:
        return kept | {"role": "assistant", "content": "", "tool_calls": _calls(content, where)}
    if role not in SAME:
        raise DataError(f"{where} has the role {role!r}.{hint(str(role), (*SAME, *CALLS))}")
    if "from" in turn and isinstance(content, str) and SAME[role] == "user":
        content = content.strip()  # as the official preprocessing does with turns of this kind
    return kept | {"role": SAME[role], "content": content}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    try:
        told = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise DataError(f"{where} is a call, which must be JSON: {error}.") from None
    calls = told if isinstance(told, list) else [told]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise DataError(f"{where} must be {{'name': ..., 'arguments': ...}} or a list of them, it is {told!r:.80}.")
    return [{"type": "function", "function": call} for call in calls]
