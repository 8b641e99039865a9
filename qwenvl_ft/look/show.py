"""Writes an HTML page of what the model will see: samples with pictures, objects and tokens, and the first rows.

The page is self-contained: it needs no server and no network.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.collate import QwenVLCollator, tokens_per_sample
from qwenvl_ft.data.conversation import Image, Sample
from qwenvl_ft.data.media.images import image_size
from qwenvl_ft.data.plan.dataset import SampleDataset, Ticket
from qwenvl_ft.data.plan.packing import pack_lengths, single_rows
from qwenvl_ft.data.plan.windows import WindowDataset
from qwenvl_ft.errors import DataError
from qwenvl_ft.look import FIRST
from qwenvl_ft.look.first_records import first_windows
from qwenvl_ft.look.histogram import Histogram, depth_histogram
from qwenvl_ft.look.page import render
from qwenvl_ft.look.pictures import data_uri, pictures
from qwenvl_ft.look.placing import AUTO, Placed, emitted_units, placed_objects
from qwenvl_ft.look.readable import TRAIN, find_split, split_name
from qwenvl_ft.look.tokens import Piece, pieces, supervised_texts, texts_before_media
from qwenvl_ft.recipe.schema import Recipe

LONGEST_TEXT = 2000
"""Maximum length of a text of a source record that is shown in full, in characters; embedded images are longer."""
MOST_FRAMES = 8
"""Maximum number of frames shown of a video, spread from its first to its last."""
SMALLEST_SHOWN = 260
"""Minimum width of a picture on the page, in CSS pixels."""


@dataclass(frozen=True)
class Picture:
    """An image or a video frame on the page."""

    uri: str
    width: int
    height: int
    tokens: int
    kind: str
    name: str
    objects: list[tuple[int, Placed]]
    """(number in the list of objects, object)"""
    histogram: Histogram | None = None
    """Values before and after the conversion of an image deeper than 8 bits."""

    @property
    def shown_width(self) -> int:
        """CSS pixels."""
        return max(self.width, SMALLEST_SHOWN)


@dataclass(frozen=True)
class Card:
    """A sample on the page."""

    title: str
    where: str
    id: str
    pieces: list[Piece]
    pictures: list[Picture]
    objects: list[Placed]
    units: str
    source: str
    """Its records as JSON."""

    @property
    def tokens(self) -> int:
        return sum(count_of(piece) for piece in self.pieces)

    @property
    def supervised(self) -> int:
        return sum(count_of(piece) for piece in self.pieces if piece.supervised)

    @property
    def vision(self) -> int:
        return sum(piece.count for piece in self.pieces if piece.kind in ("image", "video"))


@dataclass(frozen=True)
class RowPart:
    """A sample within a row."""

    where: str
    id: str
    start: int
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return sum(count_of(piece) for piece in self.pieces)

    def share(self, kind: str) -> float:
        """Return the share of ``vision``, ``supervised`` or ``read`` tokens, 0 to 1."""
        return sum(count_of(piece) for piece in self.pieces if share_kind(piece) == kind) / self.tokens


@dataclass(frozen=True)
class Row:
    """A row of a batch: samples that do not attend to each other."""

    parts: list[RowPart]
    capacity: int
    """Maximum number of tokens of a row; without packing, the tokens of this row."""

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)


def count_of(piece: Piece) -> int:
    """Return the number of tokens of a piece."""
    return piece.count if piece.kind in ("image", "video") else len(piece.ids)


def share_kind(piece: Piece) -> str:
    if piece.kind in ("image", "video"):
        return "vision"
    return "supervised" if piece.supervised else "read"


def show_recipe(
    recipe: Recipe,
    target: Path,
    *,
    split: str = TRAIN,
    samples: int = 8,
    rows: int = 2,
    epoch: int = 0,
    units: str = AUTO,
    title: str = "",
    records: int = FIRST,
) -> Path:
    """Write the page for a recipe's data. An epoch of a stream (``data.streaming``) is one of its windows.

    Args:
        split: ``train``, ``val``, or ``val.NAME`` if there are several validation sets.
        samples: number of samples to show, spread evenly over the data.
        rows: number of rows to show, from the start of the epoch.
        units: unit of coordinates in answers: norm1000, norm100, unit (0 to 1), pixels (of the stored image), or auto.
        records: most records of a stream's window.

    Returns:
        ``target``.

    Raises:
        QwenVLError: the recipe has no model or no such data, or a record is malformed.
    """
    from qwenvl_ft.assemble import build_datasets, build_processor

    processor = build_processor(recipe)
    with first_windows(recipe, records) as (shown, stream):
        train, val = build_datasets(shown, processor, recipe.training.arguments["seed"], stream=stream)
        page = _page(shown, train, val, split, samples, rows, epoch, units, title)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _page(
    recipe: Recipe,
    train: SampleDataset,
    val: SampleDataset | dict[str, SampleDataset] | None,
    split: str,
    samples: int,
    rows: int,
    epoch: int,
    units: str,
    title: str,
) -> str:
    seed = recipe.training.arguments["seed"]
    evaluated = val if isinstance(val, dict) else {"": val} if val is not None else {}
    dataset = find_split({TRAIN: train} | {split_name(name): records for name, records in evaluated.items()}, split)
    at = epoch if split == TRAIN else 0
    for window in range(at + 1 if isinstance(dataset, WindowDataset) else 0):  # a stream is read in order
        if not len(dataset.at(window)):
            raise DataError(f"--epoch {epoch}: the stream ends after {window} windows, the first is 0.")
    chosen = spread(len(dataset.at(at)), samples)
    plan = epoch_rows(recipe, dataset, seed, at, shuffle=split == TRAIN)
    cards = [card(dataset, dataset.ticket(at, k), f"Sample {k}", emitted_units(recipe), units) for k in chosen]
    return render(
        "show.html.jinja",
        title=title or "What the model sees",
        split=split,
        epoch=epoch,
        model=recipe.model.model,
        summary=dataset.summary(),
        packing=recipe.training.packing,
        max_length=recipe.template.max_length,
        num_rows=len(plan),
        cards=cards,
        rows=[
            row(dataset, [dataset.ticket(at, k) for k in places], recipe.template.max_length, recipe.training.packing)
            for places in plan[:rows]
        ],
        count_of=count_of,
    )


def spread(count: int, wanted: int) -> list[int]:
    """Return indices at equal distances, including the first and the last."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(wanted, count)).round()})


def epoch_rows(recipe: Recipe, dataset: SampleDataset, seed: int, epoch: int, *, shuffle: bool) -> list[list[int]]:
    """Return the rows of an epoch as training plans them, before they are distributed over ranks."""
    arguments = recipe.training.arguments
    data_seed = arguments["data_seed"] if "data_seed" in arguments else None
    seed = seed if data_seed is None else data_seed
    if not recipe.training.packing:
        return single_rows(len(dataset.at(epoch)), seed=seed, epoch=epoch, shuffle=shuffle)
    return pack_lengths(dataset.at(epoch).tokens, max_length=recipe.template.max_length, seed=seed, epoch=epoch)


def card(dataset: SampleDataset, ticket: Ticket, title: str, dense_units: str, units: str) -> Card:
    """Prepare one sample for the page.

    Args:
        dense_units: unit of dense captions according to the recipe.
        units: unit of all answers, unless it is ``auto``.
    """
    sample = dataset[ticket]
    encoder = dataset.encoder
    sequence = pieces(sample["input_ids"].tolist(), sample["labels"].tolist(), encoder.processor.tokenizer)
    records, sizes = source_of(dataset, ticket)
    if units == AUTO and all(isinstance(record, Mapping) and "objects" in record for record in records):
        units = dense_units
    shown = picture_list(sample, sequence, encoder.processor)
    images = [picture for picture in shown if picture.kind == "image"]
    if len(sizes) != len(images):  # truncation removed some
        sizes = [(picture.width, picture.height) for picture in images]
    objects, units = placed_objects(supervised_texts(sequence), texts_before_media(sequence), sizes, units)
    numbered = list(enumerate(objects, 1))
    marked = [[(k, each) for k, each in numbered if each.picture == place] for place in range(len(images))]
    for picture, marks in zip(images, marked, strict=True):
        picture.objects.extend(marks)
    parts = dataset.conversation(ticket).media(Image)
    if len(parts) == len(images):  # truncation removed none
        drawn = [
            replace(each, histogram=depth_histogram(p.value, encoder.policy))
            for each, p in zip(images, parts, strict=True)
        ]
        shown = drawn + [picture for picture in shown if picture.kind != "image"]
    source = sample["source"]
    text = "\n".join(json.dumps(shortened(record), ensure_ascii=False, indent=2) for record in records)
    return Card(title, source.record, source.id, sequence, shown, objects, units if objects else "", text)


def picture_list(sample: Sample, sequence: Sequence[Piece], processor: Any) -> list[Picture]:
    """Return the sample's images, then frames of its videos, still without objects."""
    found: list[Picture] = []
    if "pixel_values" in sample:
        images = pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor)
        counts = [piece.count for piece in sequence if piece.kind == "image"]
        for number, ((image, *_), count) in enumerate(zip(images, counts, strict=True), 1):
            found.append(Picture(data_uri(image), *image.size, count, "image", f"image {number}", []))
    if "pixel_values_videos" in sample:
        videos = pictures(sample["pixel_values_videos"], sample["video_grid_thw"], processor.video_processor)
        for number, video in enumerate(videos, 1):
            for place in spread(len(video), MOST_FRAMES):
                name = f"video {number}, frame {place + 1} of {len(video)}"
                found.append(Picture(data_uri(video[place]), *video[place].size, 0, "video", name, []))
    return found


def source_of(dataset: SampleDataset, ticket: Ticket) -> tuple[list[Any], list[tuple[int, int]]]:
    """Return the records of a sample, and (width, height) of its images before the processor's resize."""
    records = [record for record, _, _ in dataset.epochs.raw(ticket.epoch, ticket.place)]
    images = dataset.conversation(ticket).media(Image)
    sizes = [image_size(image.value, dataset.encoder.policy) for image in images]
    return records, [(width, height) for height, width in sizes]


def shortened(value: Any) -> Any:
    """Return a record without bytes and without texts longer than `LONGEST_TEXT`."""
    if isinstance(value, dict):
        return {str(key): shortened(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(inner) for inner in value]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:200]}... ({len(value):,} characters)"
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return (
        f"({type(value).__name__} of {len(value):,} bytes)" if isinstance(value, bytes) else f"({type(value).__name__})"
    )


def row(dataset: SampleDataset, tickets: Sequence[Ticket], capacity: int, packing: bool) -> Row:
    """Prepare a row as the collator makes it, split at its sample boundaries."""
    batch = QwenVLCollator()([dataset[ticket] for ticket in tickets])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    parts, start = [], 0
    for source, length in zip(batch["sources"], tokens_per_sample(batch).tolist(), strict=True):
        cut = slice(start, start + length)
        sequence = pieces(ids[cut], labels[cut], dataset.encoder.processor.tokenizer)
        parts.append(RowPart(source.record, source.id, start, sequence))
        start += length
    return Row(parts, capacity if packing else start)
