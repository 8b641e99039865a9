"""Records of a webdataset shard: the members of a .tar whose names are equal up to the first dot form one record.

``0001.json`` is the record, in any format, and ``0001.jpg`` its image. Without a .json, text members are the record's
fields: ``0001.query.txt`` and ``0001.response.txt`` are ``query`` and ``response``. For media only offset and size are
stored; their bytes are read from the tar when a sample is built.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwenvl_ft.data.record_size import is_too_large, text_bytes, too_large
from qwenvl_ft.data.sources.json_files import MAX_BYTES, parse_json
from qwenvl_ft.errors import DataError

MEMBERS = pa.list_(pa.struct({"name": pa.string(), "offset": pa.int64(), "size": pa.int64()}))
"""Arrow type of a record's media: name in the tar, offset and size in bytes."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TEXTS = (".txt", ".text")
REFERENCE_KEYS = ("image", "images", "video", "videos", "url", "path", "image_url", "frames")
"""Keys under which the name of a member is replaced by its bytes."""


@dataclass(frozen=True)
class TarRecord:
    place: str
    """``[key]``"""
    text: str | DataError
    """The record without its media, as JSON, or why it cannot be read."""
    members: list[dict[str, Any]]
    """The media, as `MEMBERS` describes them."""


def read_tar(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[TarRecord]:
    """Yield the records of a shard, in order, without reading the media; an error for one with more text than
    ``max_bytes``.

    Raises:
        DataError: the file is not a plain tar, is cut off, or has a damaged header.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile() and not Path(member.name).name.startswith("."))
            for key, members in groupby(files, _key):
                yield _read_one(tar, key, list(members), path, max_bytes)
            _require_end(path, tar.offset)
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as .tar: {error}. A shard is a plain tar; unpack .gz first.") from None


def tar_record(record: Any, members: list[dict[str, Any]], path: Path) -> Any:
    """Insert the bytes of a record's media: where it names a member, or else as its ``images`` in the tar's order."""
    if not isinstance(record, dict) or not members:
        return record
    used: set[str] = set()
    names = {name: member for member in members for name in (member["name"], Path(member["name"]).name)}

    def filled(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: filled(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry, key) for entry in value]
        if isinstance(value, str) and key in REFERENCE_KEYS and value in names:
            used.add(value)
            return _bytes(path, names[value])
        return value

    complete = filled(record, "")
    if used or any(record.get(key) for key in ("image", "images", "video", "videos")):
        return complete
    images = [_bytes(path, member) for member in members if member["name"].lower().endswith(IMAGES)]
    return complete | ({"images": images} if images else {})


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _require_end(path: Path, offset: int) -> None:
    """Raise tarfile.ReadError unless a tar ends at ``offset``; tarfile ends its list at any header it cannot read."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block and block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header of a member at byte {offset}: the file is cut off or damaged there")


def _read_one(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], path: Path, max_bytes: int) -> TarRecord:
    texts, media = [], []
    for member in members:
        field = member.name[len(key) + 1 :]
        if field.lower() == "json" or f".{field}".lower().endswith(TEXTS):
            texts.append((field, member))
        else:
            media.append({"name": member.name, "offset": member.offset_data, "size": member.size})
    try:
        _require_small(tar, texts, f"{path}[{key}]", max_bytes)
        record = _fields(tar, texts, path)
    except DataError as error:
        return TarRecord(f"[{key}]", error, media)
    return TarRecord(f"[{key}]", json.dumps({"id": key} | record, ensure_ascii=False), media)


def _require_small(tar: tarfile.TarFile, texts: list[tuple[str, tarfile.TarInfo]], where: str, max_bytes: int) -> None:
    """Raise DataError if the text members of a record are too large; of one without media in base64 only a part is
    read."""
    size = sum(member.size for _, member in texts)
    left = max_bytes
    for _, member in texts if size > max_bytes else ():
        head = b""
        while len(head) < member.size:
            file: Any = tar.extractfile(member)
            head = file.read(max(left + 1, 2 * len(head)))
            if is_too_large(head, left):
                raise too_large(where, size, max_bytes)
        left -= text_bytes(head)


def _fields(tar: tarfile.TarFile, texts: list[tuple[str, tarfile.TarInfo]], path: Path) -> dict[str, Any]:
    """Return the fields of a record from its .json and text members.

    Raises:
        DataError: a member is not UTF-8, or a .json member is no JSON object.
    """
    record: dict[str, Any] = {}
    for field, member in texts:
        if field.lower() == "json":
            record |= _object(_text(tar, member, path), f"{path}[{member.name}]")
        else:
            record[field.rpartition(".")[0] or field] = _text(tar, member, path)
    return record


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    file: Any = tar.extractfile(member)
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}[{member.name}]: not UTF-8: {error.reason} at byte {error.start}.") from None


def _object(text: str, where: str) -> dict[str, Any]:
    record = parse_json(text, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object, not a {type(record).__name__}.")
    return record


def _bytes(path: Path, member: dict[str, Any]) -> bytes:
    with path.open("rb") as file:
        file.seek(member["offset"])
        return file.read(member["size"])
