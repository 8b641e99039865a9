"""Opens the records of a selection even if some of its files cannot be opened, or are damaged.

Training stops at the first such file, unless the recipe leaves out what cannot be read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.sources.mixture import load_mixture, load_options, load_validation, val_selections
from qwenvl_ft.data.sources.records import Records, Selection, load_records
from qwenvl_ft.data.sources.registry import find_dataset, is_pattern, matching_files, parse_selection
from qwenvl_ft.errors import DataError, RecipeError, hint
from qwenvl_ft.look.faults import Fault
from qwenvl_ft.recipe.schema import Recipe

TRAIN, VAL = "train", "val"
SplitData = TypeVar("SplitData")


@dataclass
class Opened:
    """The records of a selection."""

    parts: list[Any] = field(default_factory=list)
    """Sequences whose ``[i]`` is (record, `Source`, folder of relative media), or raises DataError."""
    faults: list[Fault] = field(default_factory=list)
    """Files that could not be opened and are missing from ``parts``."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def optional_encoder(recipe: Recipe) -> Encoder | None:
    """Build the encoder that training uses; None if the recipe names no model."""
    if not recipe.model.model:
        return None
    from qwenvl_ft.assemble import build_processor
    from qwenvl_ft.data.encode.by_recipe import build_encoder

    return build_encoder(recipe, build_processor(recipe))


def sensible_workers(recipe: Recipe) -> int:
    """Return ``data.dataset_num_proc``, limited to the number of cores."""
    return min(recipe.data.dataset_num_proc, os.cpu_count() or 1)


def open_splits(recipe: Recipe, *, num_proc: int, first: Records | None = None) -> dict[str, Opened]:
    """Return ``train`` and each validation set (``val`` or ``val.NAME``) -> the records that training would use.

    If a file cannot be opened, nothing is sampled, held out or mixed: the records of all others are returned.

    Args:
        first: the first records of a stream, from `first_records`; they are ``train``.

    Raises:
        RecipeError: the recipe has no training data.
        DataError: a selection itself is malformed.
    """
    data, seed = replace(recipe.data, on_error="skip"), recipe.training.arguments["seed"]
    try:
        train, val = load_mixture(data, seed) if first is None else (first, load_validation(data, seed))
        return {TRAIN: Opened([train])} | {split_name(name): Opened([records]) for name, records in val.items()}
    except DataError:
        pass
    options = load_options(data, seed) | {"num_proc": num_proc}
    splits = {TRAIN: open_selection(data.train, options) if first is None else Opened([first])}
    if data.train_dataset_mix_ds:
        mixed = open_selection(data.train_dataset_mix_ds, options)
        splits[TRAIN] = Opened(splits[TRAIN].parts + mixed.parts, splits[TRAIN].faults + mixed.faults)
    validation = {
        split_name(name): open_selection(selection, options) for name, selection in val_selections(data).items()
    }
    return splits | validation


def split_name(name: str) -> str:
    """Return ``val.NAME``, or ``val`` for a validation set without a name."""
    return f"{VAL}.{name}".rstrip(".")


def find_split(splits: Mapping[str, SplitData], name: str) -> SplitData:
    """Return a split by name; raises RecipeError if the recipe has no such split."""
    if name not in splits:
        raise RecipeError(f"--split {name}: the recipe has no such split.{hint(name, splits)}")
    return splits[name]


def open_selection(selection: Selection, options: dict[str, Any]) -> Opened:
    """Open the records of a selection; files that cannot be opened become faults.

    Args:
        options: keyword arguments of `load_records`.
    """
    opened = Opened()
    for name, amount in parse_selection(selection):
        part = [f"{name}#{amount}"] if isinstance(amount, int) else [f"{name}%{amount * 100:.12g}"]
        try:
            opened.parts.append(load_records({name: 1} if isinstance(selection, Mapping) else part, **options))
        except DataError as error:
            _one_by_one(name, str(error), options, opened)
    return opened


def _one_by_one(name: str, error: str, options: dict[str, Any], opened: Opened) -> None:
    """Open the files of a pattern one after another; whatever else cannot be opened is a fault."""
    try:
        entry = find_dataset(name)
    except DataError:
        opened.faults.append(Fault("file", name, error))
        return
    if not is_pattern(entry["annotation_path"]):
        path = str(Path(entry["annotation_path"]))
        opened.faults.append(Fault("file", path, error.removeprefix(f"{path} ")))
        return
    for file in matching_files(entry["annotation_path"]):
        found = open_selection([file], options | {"media_root": entry["data_path"] or options["media_root"]})
        opened.parts += found.parts
        opened.faults += found.faults
