"""Gives check, stats and show the first records of a stream, in the order in which training reads them.

Their shards are copied to a folder of the command's own, which is removed at its end: a run may read the same stream.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from qwenvl_ft.data.plan.windows import StreamOptions
from qwenvl_ft.data.sources.files import default_cache
from qwenvl_ft.data.sources.mixture import load_options, register
from qwenvl_ft.data.sources.records import Records
from qwenvl_ft.data.sources.shards import list_shards
from qwenvl_ft.data.sources.stream import Position, Stream
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.schema import Recipe


def first_records_line(recipe: Recipe, count: int) -> str:
    """Return the line that says how much of a stream a command looks at; empty without ``data.streaming``."""
    if not recipe.data.streaming:
        return ""
    return f"data.streaming=true: this is about the first {count:,} records of the stream; --records changes that"


@contextmanager
def first_records(recipe: Recipe, count: int) -> Iterator[Records | None]:
    """Yield the first records of a stream's first round; None without ``data.streaming``.

    Raises:
        DataError: a shard cannot be copied or opened, or no shard has a record.
    """
    if not recipe.data.streaming:
        yield None
        return
    data, seed = replace(recipe.data, on_error="skip"), recipe.training.arguments["seed"]
    with _own_folder(recipe) as folder:
        shards = list_shards(cast(Any, data.train))
        parts, _ = Stream(count, folder, load_options(data, seed)).read(Position(), shards)
        if not parts:
            raise DataError(f"none of the {len(shards)} shards has a record.")
        yield Records(parts)


@contextmanager
def first_windows(recipe: Recipe, count: int) -> Iterator[tuple[Recipe, StreamOptions | None]]:
    """Yield the recipe, for a stream with windows of at most ``count`` records, and how its stream is read."""
    if not recipe.data.streaming:
        yield recipe, None
        return
    data = replace(recipe.data, stream_window=min(count, recipe.data.stream_window))
    with _own_folder(recipe) as folder:
        shards = list_shards(cast(Any, data.train))
        options = StreamOptions(folder, lambda: shards, data.stream_rounds, reads_ahead=False)
        yield replace(recipe, data=data), options


@contextmanager
def _own_folder(recipe: Recipe) -> Iterator[Path]:
    register(recipe.data)
    cache = Path(recipe.data.stream_cache).expanduser() if recipe.data.stream_cache else default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="first-records-", dir=cache) as folder:
        yield Path(folder)
