"""Keys that several formats share: turns, ``system``, ``tools``, the weights of turns, and how images are read."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Message, Part, Source, Text, Video
from qwenvl_ft.data.media.reading import has_image_keys, read_as, reading_of
from qwenvl_ft.data.readers.media_pool import unescaped
from qwenvl_ft.errors import DataError


def checked_turns(record: dict[str, Any], key: str, source: Source, *, singular: str) -> list[Any]:
    """Return the record's list of turns.

    Args:
        singular: name of a turn in the error message.

    Raises:
        DataError: it is not a list, or empty.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: {key!r} must be a list with at least one {singular}, not {turns!r:.80}.")
    return turns


def with_record_keys(conversation: Conversation, record: dict[str, Any]) -> Conversation:
    """Add the record's ``system`` and ``tools``, which apply to the whole conversation.

    Raises:
        DataError: they are malformed, or ``system`` and a system message differ.
    """
    source, messages, system = conversation.source, conversation.messages, record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{source}: 'system' must be a text, not {system!r:.80}.")
    if system:
        existing = messages[0].content if messages[0].role == "system" else None
        system = unescaped(system)
        if existing is None:
            messages = (Message("system", (Text(system),)), *messages)
        elif existing != (Text(system),):
            raise DataError(f"{source}: both a 'system' and a system message are given, and they differ. Keep one.")
    if record.get("functions"):
        raise DataError(f"{source}: 'functions' is the old spelling. Write tools: [{{type: function, function: ...}}].")
    tools = checked_objects(record.get("tools"), f"{source}: 'tools'", "function schemas")
    return replace(conversation, messages=messages, tools=tools)


def checked_objects(value: Any, where: str, plural: str) -> tuple[dict[str, Any], ...]:
    """Return a list of objects, given as such or as JSON text; None and an empty text give an empty tuple.

    Args:
        plural: name of the objects in the error message.

    Raises:
        DataError: it is not a list of objects.
    """
    objects = value
    if isinstance(value, str):
        with suppress(ValueError):
            objects = json.loads(value) if value.strip() else None
    if objects is None:
        return ()
    if not isinstance(objects, (list, tuple)) or not all(isinstance(entry, dict) for entry in objects):
        raise DataError(f"{where} must be a list of {plural}, not {value!r:.80}.")
    return tuple(objects)


def parsed_calls(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls in a text of JSON, or in an object or a list of objects.

    Raises:
        DataError: it is not JSON, or a call has no name or no arguments.
    """
    try:
        parsed = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise DataError(f"{where} is a tool call, which must be JSON: {error}.") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise DataError(f"{where} must be {{'name': ..., 'arguments': ...}} or a list of them, not {parsed!r:.80}.")
    return [{"type": "function", "function": call} for call in calls]


def checked_loss(turn: dict[str, Any], role: str, where: str) -> tuple[bool | None, float]:
    """Return whether a turn is supervised, and the weight of its tokens in the loss.

    ``loss`` and ``weight`` set the first, ``loss_weight`` both: 0 leaves the turn out. Without them it is (None, 1.0).

    Raises:
        DataError: the value is not true, false, 1 or 0, both keys disagree, or a turn of another role than the
            assistant's is to be supervised.
    """
    flags = {key: turn[key] for key in ("loss", "weight") if turn.get(key) is not None}
    for key, loss in flags.items():
        if not isinstance(loss, (bool, int, float)) or loss not in (0, 1):
            raise DataError(f"{where} has {key}={loss!r}. Write true or false.")
        if loss and role != "assistant":
            raise DataError(f"{where} has {key}={loss!r} and role {role!r}. Only assistant turns are supervised.")
    if len(set(map(bool, flags.values()))) > 1:
        raise DataError(f"{where} has {flags}, which contradict each other. Keep one.")
    loss = bool(next(iter(flags.values()))) if flags else None
    weight = turn.get("loss_weight")
    if weight is None:
        return loss, 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise DataError(f"{where} has loss_weight={weight!r}. Give a number from 0, which leaves the turn out.")
    if weight and role != "assistant":
        raise DataError(f"{where} has loss_weight={weight!r} and role {role!r}. Only assistant turns are supervised.")
    if loss is not None and loss != bool(weight):
        raise DataError(f"{where} has {flags} and loss_weight={weight!r}, which contradict each other. Keep one.")
    return (loss, float(weight)) if weight else (False, 1.0)


def with_image_keys(conversation: Conversation, record: dict[str, Any]) -> Conversation:
    """Apply the record's ``high_bit_depth``, ``window`` and ``image_frame`` to its images and listed frames.

    Settings of a part are more specific and remain. Without images the keys may mean anything and are not read.

    Raises:
        DataError: a value is malformed, or two contradict each other.
    """
    if not has_image_keys(record) or not (conversation.media(Image) or conversation.media(Video)):
        return conversation
    reading = reading_of(record, f"{conversation.source}: ")

    def applied(part: Part) -> Part:
        if isinstance(part, Text) or hasattr(part.value, "size"):  # text, or an image that is made when it is opened
            return part
        if isinstance(part, Image):
            return replace(part, value=read_as(part.value, reading))
        frames = isinstance(part.value, (list, tuple))
        return replace(part, value=tuple(read_as(frame, reading) for frame in part.value)) if frames else part

    messages = (replace(each, content=tuple(map(applied, each.content))) for each in conversation.messages)
    return replace(conversation, messages=tuple(messages))
