"""Opens the records of a selection even if some of its files are damaged.

Training stops at the first file that cannot be opened; this module keeps the valid lines of such a file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.sources.json_files import BLANK, read_json
from qwenvl_ft.data.sources.mixture import load_mixture, val_selections
from qwenvl_ft.data.sources.records import Selection, load_records
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
    """Lines and files that could not be read and are missing from ``parts``."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Salvaged:
    """The valid lines of a file that training refuses."""

    def __init__(self, name: str, path: Path, media_root: str, texts: list[tuple[str, str]]) -> None:
        self.name, self.path, self.media_root, self.texts = name, path, media_root, texts

    def __len__(self) -> int:
        return len(self.texts)

    def summary(self) -> dict[str, int]:
        """Return name -> number of records, as `Records.summary` does."""
        return {self.name: len(self)}

    def __getitem__(self, index: int) -> tuple[Any, Source, str]:
        place, text = self.texts[index]
        where = f"{self.path}{place}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}.") from None
        name = record["id"] if isinstance(record, dict) and "id" in record else None
        return record, Source(self.name, where, "" if name is None else str(name)), self.media_root


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


def open_splits(recipe: Recipe, *, num_proc: int) -> dict[str, Opened]:
    """Return ``train`` and each validation set (``val`` or ``val.NAME``) -> the records that training would use.

    If a file would stop training, nothing is sampled, held out or mixed: every readable record is returned.

    Raises:
        RecipeError: the recipe has no training data.
        DataError: a selection itself is malformed.
    """
    data, seed = recipe.data, recipe.training.arguments["seed"]
    try:
        train, val = load_mixture(data, seed)
        return {TRAIN: Opened([train])} | {split_name(name): Opened([records]) for name, records in val.items()}
    except DataError:
        pass
    options: Any = {"seed": seed, "media_root": data.media_root, "num_proc": num_proc}
    splits = {TRAIN: open_selection(data.train, options)}
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
    """Open the records of a selection; unreadable files and lines become faults.

    Args:
        options: keyword arguments of `load_records`.
    """
    opened = Opened()
    for name, amount in parse_selection(selection):
        part = [f"{name}#{amount}"] if isinstance(amount, int) else [f"{name}%{amount * 100:.12g}"]
        try:
            opened.parts.append(load_records({name: 1} if isinstance(selection, Mapping) else part, **options))
        except DataError as error:
            _salvage(name, str(error), options["media_root"], opened)
    return opened


def _salvage(name: str, error: str, media_root: str | None, opened: Opened) -> None:
    """Add everything that can be read of a file to ``opened``, whatever sampling rate was selected."""
    try:
        entry = find_dataset(name)
    except DataError:
        opened.faults.append(Fault("file", name, error))
        return
    if is_pattern(entry["annotation_path"]):
        for file in matching_files(entry["annotation_path"]):
            found = open_selection([file], {"media_root": entry["data_path"] or media_root})
            opened.parts += found.parts
            opened.faults += found.faults
        return
    path = Path(entry["annotation_path"])
    readers = {".jsonl": _jsonl, ".json": _json}
    if path.suffix not in readers or not path.is_file():
        opened.faults.append(Fault("file", str(path), error))
        return
    faults: list[Fault] = []
    texts = list(readers[path.suffix](path, faults))
    opened.faults += faults or ([] if texts else [Fault("file", str(path), error.removeprefix(f"{path} "))])
    root = os.path.abspath(entry["data_path"] or media_root or path.parent)  # noqa: PTH100 - keeps symbolic links
    if texts:
        opened.parts.append(Salvaged(name, path, root, texts))


def _json(path: Path, faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of the entries before the first one that cannot be read."""
    try:
        yield from read_json(path)
    except DataError as error:
        where, _, message = str(error).removeprefix(str(path)).partition(": ")
        faults.append(Fault("json", f"{path}{where}", message))


def _jsonl(path: Path, faults: list[Fault]) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each record; a line that cannot be read becomes a fault."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(BLANK)
                if text.startswith("["):  # a packed sample: several records
                    for index, record in enumerate(json.loads(text)):
                        yield f":{number}[{index}]", json.dumps(record)
                elif text:
                    yield f":{number}", text
            except UnicodeDecodeError as error:
                faults.append(Fault("json", f"{path}:{number}", f"not UTF-8: {error.reason} at byte {error.start}"))
            except (ValueError, RecursionError) as error:
                faults.append(Fault("json", f"{path}:{number}", f"not valid JSON: {error}"))
