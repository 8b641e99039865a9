"""How many bytes of text does a record hold? One above ``data.max_record_bytes`` is refused before it is tokenised.

Tokenising takes about a hundred times the memory of a text, so that one line of 200 MB ends a run. Media in a record
(bytes, or base64 in its JSON) are not text: images have limits of their own.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from qwenvl_ft.errors import DataError

LARGEST_MEDIA = 2**30
"""Bytes of base64 that the text of one record may hold besides ``data.max_record_bytes`` of text."""
BASE64_MEDIA = re.compile(
    rb"(?:^|[,\t]|(?<!\\)\")"  # a value begins: in JSON, or in the cell of a table
    rb"(?:data:[\w.+-]{1,64}\\?/[\w.+-]{1,64}(?:;[\w.=+-]{1,64}){0,4};base64,|\\?/9j\\?/|iVBORw0KGgo|R0lGOD|UklGR)"
    rb"[A-Za-z0-9+/=\\\s]*"
)
"""A ``data:`` URI, or the base64 of a JPEG, PNG, GIF or WebP file, in the bytes of a JSON text or a table."""
LONGEST_HEAD = 400
"""Characters at the beginning of a text that tell whether it is base64."""


def text_bytes(raw: bytes) -> int:
    """Return the bytes of a record's JSON text or table row, without its media in base64."""
    return len(raw) - sum(match.end() - match.start() for match in BASE64_MEDIA.finditer(raw))


def is_too_large(raw: bytes, limit: int) -> bool:
    """Return True if the beginning of a record, or all of it, has more than ``limit`` bytes of text."""
    return len(raw) > limit and (len(raw) > limit + LARGEST_MEDIA or text_bytes(raw) > limit)


def utf8_bytes(text: str, limit: int) -> int:
    """Return the bytes of a text in UTF-8; 0 for one that cannot have more than ``limit``, which is not encoded."""
    return 0 if len(text) * 4 <= limit else len(text.encode("utf-8", "surrogatepass"))


def large_rows(table: pa.Table, limit: int) -> dict[int, int]:
    """Return row -> bytes of the rows of columns that have more than ``limit`` bytes of text.

    Halves a batch as long as it has more than the limit, so that a table of small rows costs a look at its batches.
    """
    found: dict[int, int] = {}
    first = 0
    for batch in table.to_batches():
        found |= _large_rows(batch, limit, first)
        first += batch.num_rows
    return found


def too_large(where: str, size: int, limit: int, what: str = "record") -> DataError:
    """Return the error for a record, or a conversation of several, of ``size`` bytes in all."""
    return DataError(
        f"{where}: the {what} of {size} bytes holds more text than data.max_record_bytes={limit} allows. Split or drop "
        "it, raise the limit, or set data.on_error=skip to leave such records out."
    )


def _large_rows(batch: pa.RecordBatch, limit: int, first: int) -> dict[int, int]:
    if sum(_array_bytes(column) for column in batch.columns) <= limit:
        return {}
    if batch.num_rows == 1:
        size = sum(_array_bytes(column, exact=True) for column in batch.columns)
        return {first: size} if size > limit else {}
    half = batch.num_rows // 2
    return _large_rows(batch.slice(0, half), limit, first) | _large_rows(batch.slice(half), limit, first + half)


def _array_bytes(array: pa.Array, *, exact: bool = False) -> int:
    """Return the bytes of a column without binary values, which are media; ``exact`` leaves out base64 too."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _array_bytes(array.storage, exact=exact)
    if pa.types.is_struct(kind):
        return sum(_array_bytes(child, exact=exact) for child in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _array_bytes(array.flatten(), exact=exact)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return 0
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return int(array.nbytes)
    if exact:
        heads = pc.utf8_slice_codeunits(array, 0, LONGEST_HEAD).to_pylist()
        array = array.filter(pa.array([not BASE64_MEDIA.match((head or "").encode()) for head in heads], pa.bool_()))
    return pc.sum(pc.binary_length(array)).as_py() or 0
