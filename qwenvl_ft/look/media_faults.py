"""Checks that media files exist and can be decoded, and returns their sizes and content hashes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from qwenvl_ft.data.media.elsewhere import absent
from qwenvl_ft.data.media.frames import unchosen_frames
from qwenvl_ft.data.media.images import MediaPolicy, image_size, medium_name, open_image, stored_mode
from qwenvl_ft.data.media.reading import ReadAs
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.reference import reason_of

KNOWN = 50_000
"""Number of media that a process remembers; questions about the same image usually follow each other."""


@dataclass(frozen=True, slots=True)
class MediumResult:
    """Result of opening a medium."""

    fault: tuple[str, str] | None
    """(reason, message) if something is wrong with it."""
    key: bytes = b""
    """Content hash: of an image's decoded pixels, or of a video file's bytes; empty if it cannot be read."""
    size: tuple[int, int] = (0, 0)
    """(width, height) in pixels, after EXIF rotation; (0, 0) for a video file."""
    mode: str = ""
    """What the image file holds, see `stored_mode`; empty for a video file."""
    frames: int = 0
    """Frames or pages of a file with several of which none was chosen; 0 for any other."""


class MediaInspector:
    """Opens media and remembers the last `KNOWN` files."""

    def __init__(self, policy: MediaPolicy) -> None:
        self.policy = policy
        self._known: dict[Any, MediumResult] = {}

    def image(self, value: Any) -> MediumResult:
        """Decode the whole image."""
        return self._once(value, self._decoded)

    def video(self, value: Any) -> list[MediumResult]:
        """Check the frames of a video, or its file."""
        if isinstance(value, (str, Path, bytes)):
            return [self._once(value, _file)]
        return [self.image(frame) for frame in value]

    def _once(self, value: Any, look: Any) -> MediumResult:
        name = value.value if isinstance(value, ReadAs) else value
        if not isinstance(name, (str, Path)):
            return look(value)
        name = value if isinstance(value, ReadAs) else str(value)
        if name not in self._known:
            if len(self._known) >= KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[name] = look(value)
        return self._known[name]

    def _decoded(self, value: Any) -> MediumResult:
        if _is_missing(value):
            return MediumResult(("missing", absent("image", value)))
        try:
            height, width = image_size(value, self.policy)
            image = open_image(value, self.policy)
            mode, deep = stored_mode(value, self.policy)
            frames = unchosen_frames(value, self.policy)
        except DataError as error:
            return MediumResult((reason_of(error), str(error)))
        key = xxhash.xxh3_128_digest(image.tobytes() + b"%dx%d" % image.size)
        fault = None
        if image.size != (width, height):
            shown = "x".join(map(str, image.size))
            fault = (
                "size",
                f"image {medium_name(value)}: the header says {width}x{height} pixels, but it decodes to {shown}.",
            )
        return MediumResult(fault, key, image.size, deep or mode, frames)


def _file(value: Any) -> MediumResult:
    """Hash the bytes of a video file; the encoder decodes its frames."""
    if isinstance(value, bytes):
        return MediumResult(None, xxhash.xxh3_128_digest(value))
    if _is_missing(value):
        return MediumResult(("missing", absent("video", value)))
    digest = xxhash.xxh3_128()
    try:
        with Path(value).open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        return MediumResult(("corrupt", f"video {value} cannot be read: {error.strerror}."))
    return MediumResult(None, digest.digest())


def _is_missing(value: Any) -> bool:
    """Return True for a path that does not exist; URLs and base64 are not paths."""
    value = value.value if isinstance(value, ReadAs) else value
    if not isinstance(value, (str, Path)):
        return False
    text = str(value)
    if text.startswith(("http://", "https://", "data:")) or len(text) > 4096:
        return False
    try:
        return not Path(text).exists()
    except OSError:  # base64 without a header is too long for a name
        return False
