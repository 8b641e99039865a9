"""What the model will see, as one HTML page: samples with their pictures, objects and tokens, the first packed rows.

The page holds everything it shows: it needs no server and no network.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.collate import QwenVLCollator, sample_lengths
from qwenvl_ft.data.conversation import Image, Sample
from qwenvl_ft.data.media.images import image_size
from qwenvl_ft.data.plan.dataset import SampleDataset, Ticket
from qwenvl_ft.data.plan.packing import pack_lengths, single_rows
from qwenvl_ft.look.page import render
from qwenvl_ft.look.pictures import data_uri, pictures
from qwenvl_ft.look.placing import AUTO, Placed, emitted_units, placed_objects
from qwenvl_ft.look.readable import TRAIN, find_split, split_name
from qwenvl_ft.look.tokens import Piece, learned_texts, pieces, texts_before_media
from qwenvl_ft.recipe.schema import Recipe

LONGEST_TEXT = 2000
"""Characters of a text that the source record shows; embedded images are long."""
MOST_FRAMES = 8
"""Frames of a video that are shown, from its first to its last."""
SMALLEST_SHOWN = 260
"""Pixels of the page that a picture is wide at least."""


@dataclass(frozen=True)
class Picture:
    """An image or a video frame, as the page has it."""

    uri: str
    width: int
    height: int
    tokens: int
    kind: str
    name: str
    objects: list[tuple[int, Placed]]
    """(number in the list of objects, object)"""

    @property
    def shown_width(self) -> int:
        """CSS pixels."""
        return max(self.width, SMALLEST_SHOWN)


@dataclass(frozen=True)
class Card:
    """A sample, as the page has it."""

    title: str
    where: str
    id: str
    pieces: list[Piece]
    pictures: list[Picture]
    objects: list[Placed]
    units: str
    source: str
    """Its record as JSON; empty if several records made it."""

    @property
    def tokens(self) -> int:
        return sum(count_of(piece) for piece in self.pieces)

    @property
    def learned(self) -> int:
        return sum(count_of(piece) for piece in self.pieces if piece.learned)

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
        """Share of ``vision``, ``learned`` or ``read`` tokens, 0 to 1."""
        return sum(count_of(piece) for piece in self.pieces if share_kind(piece) == kind) / self.tokens


@dataclass(frozen=True)
class Row:
    """A batch's row: samples that do not see each other."""

    parts: list[RowPart]
    capacity: int
    """Tokens that it takes; what it has, without packing."""

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)


def count_of(piece: Piece) -> int:
    """Tokens of a piece."""
    return piece.count if piece.kind in ("image", "video") else len(piece.ids)


def share_kind(piece: Piece) -> str:
    if piece.kind in ("image", "video"):
        return "vision"
    return "learned" if piece.learned else "read"


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
) -> Path:
    """Write the page of a recipe's data.

    Args:
        split: ``train`` or ``val``; ``val.NAME`` is one of several sets.
        samples: how many are shown, taken from all over the data.
        rows: how many of the epoch's first.
        units: of the coordinates in answers: norm1000, norm100, unit (0 to 1), pixels (of the stored image), or auto.

    Returns:
        ``target``.

    Raises:
        QwenVLError: the recipe has no model or no such data, or a record is malformed.
    """
    from qwenvl_ft.assemble import build_datasets, build_processor

    processor = build_processor(recipe)
    seed = recipe.training.arguments["seed"]
    train, val = build_datasets(recipe, processor, seed)
    evaluated = val if isinstance(val, dict) else {"": val} if val is not None else {}
    dataset = find_split({TRAIN: train} | {split_name(name): told for name, told in evaluated.items()}, split)
    at = epoch if split == TRAIN else 0
    chosen = spread(len(dataset.at(at)), samples)
    plan = epoch_rows(recipe, dataset, seed, at, shuffle=split == TRAIN)
    cards = [card(dataset, dataset.ticket(at, k), f"Sample {k}", emitted_units(recipe), units) for k in chosen]
    page = render(
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
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def spread(count: int, wanted: int) -> list[int]:
    """Indices at equal distances, the first and the last among them."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(wanted, count)).round()})


def epoch_rows(recipe: Recipe, dataset: SampleDataset, seed: int, epoch: int, *, shuffle: bool) -> list[list[int]]:
    """The rows of an epoch before they are dealt out to processes, as training plans them."""
    told = recipe.training
    given = told.arguments["data_seed"] if "data_seed" in told.arguments else None
    seed = seed if given is None else given
    if not told.packing:
        return single_rows(len(dataset.at(epoch)), seed=seed, epoch=epoch, shuffle=shuffle)
    return pack_lengths(dataset.at(epoch).tokens, max_length=recipe.template.max_length, seed=seed, epoch=epoch)


def card(dataset: SampleDataset, ticket: Ticket, title: str, dense_units: str, units: str) -> Card:
    """One sample as the page has it.

    Args:
        dense_units: unit of dense captions, which the recipe says.
        units: of all answers, if it is not ``auto``.
    """
    sample = dataset[ticket]
    encoder = dataset.encoder
    told = pieces(sample["input_ids"].tolist(), sample["labels"].tolist(), encoder.processor.tokenizer)
    records, sizes = source_of(dataset, ticket)
    if units == AUTO and all(isinstance(record, Mapping) and "objects" in record for record in records):
        units = dense_units
    shown = picture_list(sample, told, encoder.processor)
    images = [picture for picture in shown if picture.kind == "image"]
    if len(sizes) != len(images):  # some were cut off
        sizes = [(picture.width, picture.height) for picture in images]
    objects, units = placed_objects(learned_texts(told), texts_before_media(told), sizes, units)
    numbered = list(enumerate(objects, 1))
    marked = [[(k, each) for k, each in numbered if each.picture == place] for place in range(len(images))]
    for picture, marks in zip(images, marked, strict=True):
        picture.objects.extend(marks)
    source = sample["source"]
    text = "\n".join(json.dumps(shortened(record), ensure_ascii=False, indent=2) for record in records)
    return Card(title, source.record, source.id, told, shown, objects, units if objects else "", text)


def picture_list(sample: Sample, told: Sequence[Piece], processor: Any) -> list[Picture]:
    """The sample's images, then frames of its videos; no objects yet."""
    found: list[Picture] = []
    if "pixel_values" in sample:
        images = pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor)
        counts = [piece.count for piece in told if piece.kind == "image"]
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
    """The records of a sample, and (width, height) of its images before the processor's resize."""
    records = [record for record, _, _ in dataset.epochs.raw(ticket.epoch, ticket.place)]
    images = dataset.conversation(ticket).media(Image)
    sizes = [image_size(image.value, dataset.encoder.policy) for image in images]
    return records, [(width, height) for height, width in sizes]


def shortened(value: Any) -> Any:
    """A record without what no one reads: bytes, and texts that are longer than a screen."""
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
    """A row as the collator makes it, cut at the borders that its text positions tell."""
    batch = QwenVLCollator()([dataset[ticket] for ticket in tickets])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    parts, start = [], 0
    for source, length in zip(batch["sources"], sample_lengths(batch).tolist(), strict=True):
        cut = slice(start, start + length)
        told = pieces(ids[cut], labels[cut], dataset.encoder.processor.tokenizer)
        parts.append(RowPart(source.record, source.id, start, told))
        start += length
    return Row(parts, capacity if packing else start)
