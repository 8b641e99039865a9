"""Media tags in texts, and the media of a record that they stand for."""

import re
from typing import Any

from qwenvl_ft.data.conversation import Image, Part, Source, Text, Video
from qwenvl_ft.data.media.images import resolve_path, unpack_arrow
from qwenvl_ft.data.readers.media_settings import checked_fps
from qwenvl_ft.errors import DataError

TAGS = re.compile(r"(?<!\\)(<image>|<video>|<audio>)")
"""The tags of media. A backslash before one makes it text."""
ESCAPED = re.compile(r"\\(<image>|<video>|<audio>)")


class TagsError(DataError):
    """The media tags in the text do not match the media of the record."""


def split_tags(text: str, pool: "MediaPool") -> tuple[Part, ...]:
    """Split a text at its ``<image>`` and ``<video>`` tags into parts, taking the media from the pool in order.

    The text pieces are stripped, and blank ones dropped; ``\\<image>`` in them becomes ``<image>``.

    Raises:
        TagsError: a tag has no medium, or is ``<audio>``.
    """
    parts: list[Part] = []
    for piece in TAGS.split(text):
        if piece in ("<image>", "<video>"):
            parts.append(pool.take(piece))
        elif piece == "<audio>":
            raise TagsError(
                f"{pool.source}: the text has <audio>, a medium that the model has no input for. Drop the record; if "
                "it is meant as text, write \\<audio>."
            )
        elif piece.strip():
            parts.append(Text(unescaped(piece.strip())))
    return tuple(parts)


def unescaped(text: str) -> str:
    """Return a text as the model sees it: ``\\<image>`` becomes ``<image>``, likewise the other tags."""
    return ESCAPED.sub(r"\1", text) if "\\<" in text else text


class MediaPool:
    """The media of a record, handed out in order. Every tag needs one, and none may be left over.

    Args:
        record: with ``image`` or ``images`` (one or a list) and ``video`` or ``videos``. A video is a path or a list
            of frames.
    """

    def __init__(self, record: dict[str, Any], source: Source, media_root: str | None) -> None:
        self.source = source
        self.fps = checked_fps(record.get("fps"), str(source))
        self.images = [Image(medium_value(v, "image", source, media_root)) for v in _values(record, "image", source)]
        self.videos = [self._video(v, media_root) for v in _values(record, "video", source)]
        self._next = {"<image>": 0, "<video>": 0}

    def _video(self, value: Any, media_root: str | None) -> Video:
        if isinstance(value, (list, tuple)):
            if not value:
                raise DataError(f"{self.source}: a video is an empty list of frames.")
            frames = tuple(medium_value(frame, "frame", self.source, media_root) for frame in value)
            return Video(frames, self.fps)
        return Video(medium_value(value, "video", self.source, media_root), self.fps)

    def has(self, tag: str) -> bool:
        return bool(self.images if tag == "<image>" else self.videos)

    def take(self, tag: str) -> Part:
        """Return the next image or video.

        Raises:
            TagsError: all of them have been taken.
        """
        media: list[Any] = self.images if tag == "<image>" else self.videos
        place = self._next[tag]
        if place >= len(media):
            raise TagsError(
                f"{self.source}: more {tag} tags than media ({len(media)}). Add the file or drop the tag; if it is "
                f"meant as text, write \\{tag}."
            )
        self._next[tag] += 1
        return media[place]

    def finish(self) -> None:
        """Raise TagsError if a medium has not been taken."""
        for tag, media in (("<image>", self.images), ("<video>", self.videos)):
            left = len(media) - self._next[tag]
            if left:
                raise TagsError(
                    f"{self.source}: {left} of {len(media)} media have no {tag} tag. Write {tag} where each belongs."
                )


def medium_value(value: Any, kind: str, source: Source, media_root: str | None) -> Any:
    """Return a medium's value as `Image.value` wants it: Arrow structs unpacked, relative paths resolved.

    Raises:
        DataError: the value is empty, or of a type that cannot be a medium.
    """
    value = unpack_arrow(value)
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise DataError(f"{source}: an empty {kind}. Give a path, bytes, a data: URI or a PIL image.")
    if isinstance(value, (int, float, dict, list, tuple)):
        raise DataError(f"{source}: the {kind} {value!r:.80} is a {type(value).__name__}. Give a path, bytes or a URI.")
    return resolve_path(value, media_root)


def _values(record: dict[str, Any], kind: str, source: Source) -> list[Any]:
    """Return the values under ``kind`` or its plural as a list; an empty list counts as absent."""
    keys = [key for key in (kind, f"{kind}s") if record.get(key) is not None and not _is_empty(record[key])]
    if len(keys) > 1:
        raise DataError(f"{source}: both {keys[0]!r} and {keys[1]!r} are given. Keep one.")
    value = record[keys[0]] if keys else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value
