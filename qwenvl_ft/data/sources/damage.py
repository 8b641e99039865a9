"""How does a damaged part of a file become rows, each of which raises when it is read?

With ``on_error: skip`` such rows are counted and left out like other unreadable records. Otherwise the first damage
stops the run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from qwenvl_ft.errors import DataError

COLUMN = "qwenvl_ft_damage"
"""Column of a damaged file's Arrow copy: why the row cannot be read; null in rows that can be."""


class EmptyError(DataError):
    """A file has no records."""


@dataclass(frozen=True)
class Damage:
    """Rows that cannot be read."""

    error: DataError
    rows: int = 1
    last: bool = False
    """True if nothing that follows in the file can be read either."""

    def __str__(self) -> str:
        return f"{self.error} What follows in this file is left out too." if self.last else str(self.error)


Batch: TypeAlias = pa.RecordBatch | Damage


def intact(batches: Iterable[Batch]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file; raise the error of the first damage."""
    for batch in batches:
        if isinstance(batch, Damage):
            raise batch.error
        yield batch


def marked(schema: pa.Schema, batches: Iterable[Batch]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return schema and batches with `COLUMN`, in which damage is rows of nulls and the reason."""
    fields = [field.with_nullable(True) for field in schema]
    whole = pa.schema([*fields, pa.field(COLUMN, pa.string())], metadata=schema.metadata)

    def columns(batch: Batch) -> list[pa.Array]:
        if isinstance(batch, Damage):
            return [*(pa.nulls(batch.rows, field.type) for field in fields), pa.array([str(batch)] * batch.rows)]
        return [*batch.columns, pa.nulls(batch.num_rows, pa.string())]

    return whole, (pa.record_batch(columns(batch), schema=whole) for batch in batches)
