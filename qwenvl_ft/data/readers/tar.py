"""The samples of a webdataset shard: members of a .tar that share a name up to its first dot.

``0001.json`` is the record, in any format; ``0001.jpg`` its image. Without a .json the text members are the record's
fields: ``0001.query.txt`` and ``0001.response.txt`` are ``query`` and ``response``. Only the places of media are
kept; their bytes are read from the tar when a sample is made.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwenvl_ft.errors import DataError

MEMBERS = pa.list_(pa.struct({"name": pa.string(), "offset": pa.int64(), "size": pa.int64()}))
"""Name in the tar, first byte and number of bytes of each medium."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TEXTS = (".txt", ".text")
REFERRED = ("image", "images", "video", "videos", "url", "path", "image_url", "frames")
"""Keys under which a member's name stands for its bytes."""


@dataclass(frozen=True)
class TarSample:
    place: str
    """``[key]``"""
    text: str
    """The record without its media, as JSON."""
    members: list[dict[str, Any]]


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of a shard, in order; of the media only the headers are passed over.

    Raises:
        DataError: the file is no plain tar, or a .json or text member cannot be read.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            told = (member for member in tar if member.isfile() and not Path(member.name).name.startswith("."))
            for key, members in groupby(told, _key):
                yield _sample(tar, key, list(members), path)
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read as .tar: {error}. A shard is a plain tar; unpack .gz first.") from None


def tar_record(record: Any, members: list[dict[str, Any]], path: Path) -> Any:
    """A record with its media's bytes: where it names a member, else as its ``images`` in the tar's order."""
    if not isinstance(record, dict) or not members:
        return record
    taken: set[str] = set()
    names = {name: member for member in members for name in (member["name"], Path(member["name"]).name)}

    def filled(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: filled(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry, key) for entry in value]
        if isinstance(value, str) and key in REFERRED and value in names:
            taken.add(value)
            return _bytes(path, names[value])
        return value

    told = filled(record, "")
    if taken or any(record.get(key) for key in ("image", "images", "video", "videos")):
        return told
    images = [_bytes(path, member) for member in members if member["name"].lower().endswith(IMAGES)]
    return told | ({"images": images} if images else {})


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _sample(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], path: Path) -> TarSample:
    record: dict[str, Any] = {}
    media: list[dict[str, Any]] = []
    for member in members:
        field = member.name[len(key) + 1 :]
        if field.lower() == "json":
            record |= _object(_text(tar, member, path), f"{path}[{member.name}]")
        elif f".{field}".lower().endswith(TEXTS):
            record[field.rpartition(".")[0] or field] = _text(tar, member, path)
        else:
            media.append({"name": member.name, "offset": member.offset_data, "size": member.size})
    return TarSample(f"[{key}]", json.dumps({"id": key} | record, ensure_ascii=False), media)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    file: Any = tar.extractfile(member)
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}[{member.name}]: not UTF-8: {error.reason} at byte {error.start}.") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(told, dict):
        raise DataError(f"{where}: a record is a JSON object, this is a {type(told).__name__}.")
    return told


def _bytes(path: Path, member: dict[str, Any]) -> bytes:
    with path.open("rb") as file:
        file.seek(member["offset"])
        return file.read(member["size"])
