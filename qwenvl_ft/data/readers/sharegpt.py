"""ShareGPT's additional roles: tool calls, tool results, and other names for user and assistant.

```json
{"tools": [{"type": "function", "function": {"name": "measure"}}],
 "conversations": [{"from": "human", "value": "How long?"},
                   {"from": "function_call", "value": "{\"name\": \"measure\", \"arguments\": {}}"},
                   {"from": "observation", "value": "12 mm"}, {"from": "gpt", "value": "12 mm."}]}
```
Records without these roles are plain ``conversations`` or ``messages``. The value of a ``function_call`` turn is one
call or a list of calls, as JSON. Turns have ``from`` and ``value``, or ``role`` and ``content``.
"""

from typing import Any

from qwenvl_ft.data import conversation
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import conversations
from qwenvl_ft.data.readers.record_keys import parsed_calls
from qwenvl_ft.errors import DataError, hint

LISTS = ("conversations", "messages")
MESSAGE_ROLES = {
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
"""Roles of turns in which the assistant calls tools."""
ADDITIONAL = {
    "conversations": {*MESSAGE_ROLES, *CALLS}.difference(conversations.ROLES),
    "messages": {*MESSAGE_ROLES, *CALLS}.difference(conversation.ROLES),
}
"""Key of the list of turns -> roles that the plain format does not have."""


def matches(record: dict[str, Any]) -> bool:
    """Return True if a turn has an additional role, or if ``conversations`` hold ``role`` and ``content`` turns."""
    for key in LISTS:
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            roles = (_role(turn) for turn in turns if isinstance(turn, dict))
            additional = any(isinstance(role, str) and role in ADDITIONAL[key] for role in roles)
            return additional or (key == "conversations" and "role" in turns[0])
    return False


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """Return the record as ``messages``.

    Raises:
        DataError: a turn has an unknown role, a call is not JSON, or the record has turns under both keys.
    """
    key, *others = (key for key in LISTS if isinstance(record.get(key), list) and record[key])
    if others:
        raise DataError(
            f"{source}: both {key!r} and {others[0]!r} are given. Keep one, or set data.ignored_keys=[{others[0]}]."
        )
    messages = [_message(turn, f"{source}: {key}[{number}]") for number, turn in enumerate(record[key])]
    return {name: value for name, value in record.items() if name not in LISTS} | {"messages": messages}


def _role(turn: dict[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be {{'from': ..., 'value': text}}, not {turn!r:.80}.")
    role = _role(turn)
    texts = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise DataError(f"{where} has both 'value' and 'content', and they differ. Keep one.")
    content = texts[0] if texts else None
    kept = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
    if role in CALLS:
        return kept | {"role": "assistant", "content": "", "tool_calls": parsed_calls(content, where)}
    if role not in MESSAGE_ROLES:
        raise DataError(f"{where} has the role {role!r}.{hint(str(role), (*MESSAGE_ROLES, *CALLS))}")
    if "from" in turn and isinstance(content, str) and MESSAGE_ROLES[role] == "user":
        content = content.strip()  # as the official preprocessing does with from/value turns
    return kept | {"role": MESSAGE_ROLES[role], "content": content}
