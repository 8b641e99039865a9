"""The size of a plain JPEG, a third of the time that PIL takes to open it; of any other file nothing is said.

Planning reads the header of every image. What could turn, nest or damage one is left to PIL: EXIF and XMP, several
pictures in a file, unusual coding, and every header that does not read as expected.

Source: ITU-T T.81, annex B.
"""

import os

HEAD = 8192
"""Bytes that are read; a longer header, as with a large colour profile, is PIL's."""
FRAMES = (0xC0, 0xC1, 0xC2)
"""Segments that tell the size: baseline, extended, progressive."""
TABLES, PROFILE, SCAN = 0xDB, 0xE2, 0xDA
PASSED = frozenset({SCAN, 0xC4, 0xDD, 0xE0, 0xEE, 0xFE})
"""Segments that say nothing of the size: Huffman tables, restarts, JFIF, Adobe, comments."""


def jpeg_size(path: str) -> tuple[int, int] | None:
    """(height, width) of a plain JPEG file; None if it is not one, or cannot be opened."""
    try:
        with open(path, "rb", buffering=0, opener=_at_once) as file:
            return _size(file.read(HEAD) or b"")  # None of a pipe in which nothing is yet
    except (OSError, ValueError):
        return None


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe without waiting for somebody who writes."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _size(head: bytes) -> tuple[int, int] | None:
    """Walks the segments, each ``FF kind length(2) body``, up to the first scan."""
    if head[:3] != b"\xff\xd8\xff":
        return None
    place, size = 2, None
    while place + 4 <= len(head) and head[place] == 0xFF:
        kind, begin = head[place + 1], place + 4
        end = place + 2 + (head[place + 2] << 8 | head[place + 3])
        if not begin <= end <= len(head):
            return None
        if kind == SCAN:
            return size
        if kind in FRAMES:
            if size is not None or not _is_plain_frame(head[begin:end]):
                return None
            size = head[begin + 1] << 8 | head[begin + 2], head[begin + 3] << 8 | head[begin + 4]
        elif kind == TABLES:
            if (end - begin) % 65 or any(head[table] > 15 for table in range(begin, end, 65)):
                return None  # not whole tables of 8-bit numbers
        elif kind not in PASSED and not (kind == PROFILE and head[begin:end].startswith(b"ICC_PROFILE\0")):
            return None
        place = end
    return None


def _is_plain_frame(body: bytes) -> bool:
    """Whether it has 8 bits, an area, and one or three colours as long as they should be."""
    return (
        len(body) > 5 and body[0] == 8 and any(body[1:3]) and any(body[3:5]) and len(body) == 6 + 3 * body[5] in (9, 15)
    )
