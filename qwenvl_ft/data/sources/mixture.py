"""Load the training and validation records of a recipe's ``data`` section.

The result is a function of the section and the seed, so that all ranks see the same records.
"""

from pathlib import Path
from typing import Any

from qwenvl_ft.data.readers import import_reader, register_reader
from qwenvl_ft.data.sources.key_rules import KeyRules
from qwenvl_ft.data.sources.records import Records, Selection, load_records
from qwenvl_ft.data.sources.registry import register_dataset
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.recipe.schema import DataConfig

ALL = -1
"""Value of ``train_dataset_sample`` and ``val_dataset_sample`` that takes all records."""


def register(data: DataConfig) -> None:
    """Register the data sets and readers that the section defines.

    Raises:
        DataError: a name is not allowed in a selection, or a reader cannot be imported.
    """
    for name, path in reversed(data.readers.items()):  # the last one registered is tried first
        reader = import_reader(path)
        register_reader(name, reader.matches, reader.read)
    for name, entry in data.datasets.items():
        rooted: dict[str, Any] = {key: _rooted(key, value, data.datasets_root) for key, value in entry.items()}
        register_dataset(name, **rooted)


def _rooted(key: str, value: str, root: str | None) -> str:
    """Return the value of an entry; a relative path starts at ``data.datasets_root``."""
    if key == "reader" or not value or root is None or "://" in value:
        return value
    return str(Path(root).expanduser() / value)


def val_selections(data: DataConfig) -> dict[str, Selection]:
    """Return name -> selection of each validation set; a single set has the empty name."""
    if not data.val:
        return {}
    return dict(data.val) if isinstance(data.val, dict) else {"": data.val}


def load_options(data: DataConfig, seed: int) -> dict[str, Any]:
    """Return the keyword arguments of `load_records` that the section sets."""
    return {
        "seed": seed,
        "media_root": data.media_root,
        "media_outside_root": data.media_outside_root,
        "num_proc": data.dataset_num_proc,
        "skip": data.skips_unreadable,
        "rules": KeyRules.of(data),
        "max_record_bytes": data.max_record_bytes,
    }


def load_mixture(data: DataConfig, seed: int) -> tuple[Records, dict[str, Records]]:
    """Return the training records, and the validation records by name (empty for a single set).

    The steps, in order: ``split_dataset_ratio`` holds out a part if ``data.val`` is not given, ``train_dataset_sample``
    and ``val_dataset_sample`` draw records, ``train_dataset_mix_ratio`` mixes in others.

    Raises:
        RecipeError: ``data.train`` is not set, or is a stream.
        DataError: a data set does not exist or cannot be read, there is nothing to mix in, or a split is empty.
    """
    if not data.train:
        raise RecipeError("data.train is not set. Give a file or a registered name: data.train=my.jsonl.")
    require_whole(data)
    register(data)
    options = load_options(data, seed)
    train = load_records(data.train, **options)
    others = load_records(data.train_dataset_mix_ds, **options) if data.train_dataset_mix_ds else None
    if data.train_dataset_mix_ratio and others is None:
        train, others = _first_and_others(train)
    val = _given_validation(data, options)
    if data.split_dataset_ratio and not val:
        train, val[""] = train.split(data.split_dataset_ratio, seed)
    if data.train_dataset_sample != ALL:
        train = train.sampled(data.train_dataset_sample, seed)
    val = _sampled_validation(data, val, seed)
    if data.train_dataset_mix_ratio and others is not None:
        train = train.mixed(others, data.train_dataset_mix_ratio, seed)
    return train, val


def require_whole(data: DataConfig) -> None:
    """Raise RecipeError if the training records are a stream, whose shards belong to the run that reads it."""
    if data.streaming:
        raise RecipeError(
            "data.streaming=true: only training, check, stats and show read a stream. Give some of its shards as "
            "files: data.streaming=false data.train=shard.tar."
        )


def load_validation(data: DataConfig, seed: int) -> dict[str, Records]:
    """Return the validation records of ``data.val`` by name, as `load_mixture` does.

    Raises:
        DataError: a data set does not exist or cannot be read.
    """
    register(data)
    return _sampled_validation(data, _given_validation(data, load_options(data, seed)), seed)


def _given_validation(data: DataConfig, options: dict[str, Any]) -> dict[str, Records]:
    return {name: load_records(selection, **options) for name, selection in val_selections(data).items()}


def _sampled_validation(data: DataConfig, val: dict[str, Records], seed: int) -> dict[str, Records]:
    if data.val_dataset_sample == ALL:
        return val
    return {name: records.sampled(data.val_dataset_sample, seed) for name, records in val.items()}


def joined(sets: dict[str, Records]) -> Records:
    """Concatenate all sets."""
    return Records([part for records in sets.values() for part in records.parts])


def _first_and_others(train: Records) -> tuple[Records, Records]:
    if len(train.parts) < 2:
        raise DataError(
            "data.train_dataset_mix_ratio mixes in other data sets, but data.train names only one. Name the others in "
            "data.train_dataset_mix_ds."
        )
    return Records(train.parts[:1]), Records(train.parts[1:])
