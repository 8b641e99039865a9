"""``{"image": ..., "conversations": [{"from": "human", "value": "<image>..."}, ...]}``: the official format.

Human text is split at its media tags, the pieces are stripped and blank ones dropped, as the official preprocessing
does (qwen-vl-finetune, data_processor.py); answers are kept to the letter. ``system`` and ``tools`` of the record, and
``loss`` or ``weight`` of a turn are understood too.
"""

import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Message, Part, Source, Text, Video
from qwenvl_ft.data.media.images import resolve_path
from qwenvl_ft.errors import DataError, hint

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TAGS = re.compile(r"(<image>|<video>)")


class TagsError(DataError):
    """Tags and media do not match."""


def matches(record: dict[str, Any]) -> bool:
    return record.get("conversations") is not None


def read(record: dict[str, Any], source: Source, media_root: str | None) -> Conversation:
    """Raises DataError: a turn is malformed, or tags and media do not match."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: 'conversations' must be a list with at least one turn, it is {turns!r:.80}.")
    root = _root(record, source, media_root)
    pool = MediaPool(record, source, root)
    messages = tuple(_message(turn, number, pool) for number, turn in enumerate(turns))
    pool.finish()
    return with_record_keys(Conversation(messages, source), record)


def _message(turn: Any, number: int, pool: "MediaPool") -> Message:
    source = pool.source
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise DataError(
            f"{source}: conversations[{number}] must be {{'from': ..., 'value': text}}, it is {turn!r:.80}."
        )
    for key in ("reasoning_content", "tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(f"{source}: conversations[{number}] has {key!r}. Write the record as 'messages'.")
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"{source}: conversations[{number}] has from={turn['from']!r}.{hint(str(turn['from']), ROLES)}")
    loss = checked_loss(turn, role, f"{source}: conversations[{number}]")
    text = turn["value"]
    if role == "user":
        return Message(role, split_tags(text, pool))
    if TAGS.search(text):
        raise TagsError(
            f"{source}: conversations[{number}] is a {turn['from']} turn with a media tag. Media belong to human turns."
        )
    return Message(role, (Text(text),), loss=loss)


def with_record_keys(conversation: Conversation, record: dict[str, Any]) -> Conversation:
    """The conversation with what its record says for all of it: ``system`` and ``tools``.

    Raises:
        DataError: they are malformed, or there is a system message and another ``system``.
    """
    source, messages, system = conversation.source, conversation.messages, record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{source}: 'system' must be a text, it is {system!r:.80}.")
    if system:
        own = messages[0].content if messages[0].role == "system" else None
        if own is None:
            messages = (Message("system", (Text(system),)), *messages)
        elif own != (Text(system),):
            raise DataError(f"{source}: both a 'system' and a system message are given, and they differ. Keep one.")
    if record.get("functions"):
        raise DataError(f"{source}: 'functions' is the old spelling. Write tools: [{{type: function, function: ...}}].")
    tools = checked_objects(record.get("tools"), f"{source}: 'tools'", "function schemas")
    return replace(conversation, messages=messages, tools=tools)


def checked_objects(value: Any, where: str, what: str) -> tuple[dict[str, Any], ...]:
    """A list of objects, or its JSON text; None and an empty text are an empty one."""
    told = value
    if isinstance(value, str):
        with suppress(ValueError):
            told = json.loads(value) if value.strip() else None
    if told is None:
        return ()
    if not isinstance(told, (list, tuple)) or not all(isinstance(entry, dict) for entry in told):
        raise DataError(f"{where} must be a list of {what}, it is {value!r:.80}.")
    return tuple(told)


def checked_loss(turn: dict[str, Any], role: str, where: str) -> bool | None:
    """Whether a turn is supervised, from its ``loss`` or ``weight``: true or false (or 1, 0), or not given."""
    told = {key: turn[key] for key in ("loss", "weight") if turn.get(key) is not None}
    for key, loss in told.items():
        if not isinstance(loss, (bool, int, float)) or loss not in (0, 1):
            raise DataError(f"{where} has {key}={loss!r}. Write true or false.")
        if loss and role != "assistant":
            raise DataError(f"{where} has {key}={loss!r} and is one of role {role}. Only assistant turns are learned.")
    if len(set(map(bool, told.values()))) > 1:
        raise DataError(f"{where} has {told}, which contradict each other. Keep one.")
    return bool(next(iter(told.values()))) if told else None


def checked_fps(fps: Any, where: str) -> float | None:
    """Frames a second: a positive number, or not given."""
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise DataError(f"{where}: fps={fps!r} must be a positive number of frames a second.")
    return float(fps)


def split_tags(text: str, pool: "MediaPool") -> tuple[Part, ...]:
    """Text with ``<image>`` and ``<video>`` tags as parts, media taken from the pool in order."""
    parts: list[Part] = []
    for piece in TAGS.split(text):
        if piece in ("<image>", "<video>"):
            parts.append(pool.take(piece))
        elif piece.strip():
            parts.append(Text(piece.strip()))
    return tuple(parts)


class MediaPool:
    """A record's media, handed out in order; every tag needs one, and none may be left.

    Args:
        record: with ``image`` or ``images`` (one or a list) and ``video`` or ``videos``. A video is a path or a list
            of frames.
    """

    def __init__(self, record: dict[str, Any], source: Source, media_root: str | None) -> None:
        self.source = source
        self.fps = checked_fps(record.get("fps"), str(source))
        self.images = [Image(_checked(v, "image", source, media_root)) for v in _listed(record, "image", source)]
        self.videos = [self._video(v, media_root) for v in _listed(record, "video", source)]
        self._next = {"<image>": 0, "<video>": 0}

    def _video(self, value: Any, media_root: str | None) -> Video:
        if isinstance(value, (list, tuple)):
            if not value:
                raise DataError(f"{self.source}: a video is an empty list of frames.")
            frames = tuple(_checked(frame, "frame", self.source, media_root) for frame in value)
            return Video(frames, self.fps)
        return Video(_checked(value, "video", self.source, media_root), self.fps)

    def has(self, tag: str) -> bool:
        return bool(self.images if tag == "<image>" else self.videos)

    def take(self, tag: str) -> Part:
        media: list[Any] = self.images if tag == "<image>" else self.videos
        place = self._next[tag]
        if place >= len(media):
            raise TagsError(f"{self.source}: more {tag} tags than media ({len(media)}). Add the file or drop the tag.")
        self._next[tag] += 1
        return media[place]

    def finish(self) -> None:
        """Raises TagsError if a medium was never shown."""
        for tag, media in (("<image>", self.images), ("<video>", self.videos)):
            left = len(media) - self._next[tag]
            if left:
                raise TagsError(
                    f"{self.source}: {left} of {len(media)} media have no {tag} tag. Write {tag} where each belongs."
                )


def _listed(record: dict[str, Any], kind: str, source: Source) -> list[Any]:
    """The values under ``kind`` or its plural, as a list; an empty list is as good as none."""
    keys = [key for key in (kind, f"{kind}s") if record.get(key) is not None and not _is_empty(record[key])]
    if len(keys) > 1:
        raise DataError(f"{source}: both {keys[0]!r} and {keys[1]!r} are given. Keep one.")
    value = record[keys[0]] if keys else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def _root(record: dict[str, Any], source: Source, media_root: str | None) -> str | None:
    """The record's own ``data_path`` below the media root, if it has one."""
    folder = record.get("data_path")
    if not folder:
        return media_root
    if not isinstance(folder, str):
        raise DataError(f"{source}: data_path={folder!r:.80} must be a folder's path.")
    return str(resolve_path(folder, media_root))


def _checked(value: Any, kind: str, source: Source, media_root: str | None) -> Any:
    """A medium's value: unpacked from ``{"bytes": ..., "path": ...}`` (Arrow), resolved if it is a path."""
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise DataError(f"{source}: an empty {kind}. Give a path, bytes, a data: URI or a PIL image.")
    if isinstance(value, (int, float, dict, list, tuple)):
        raise DataError(f"{source}: the {kind} {value!r:.80} is a {type(value).__name__}. Give a path, bytes or a URI.")
    return resolve_path(value, media_root)
