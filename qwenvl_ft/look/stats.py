"""What is in the data: lengths, images, answers, objects, and how much of it is always the same."""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from qwenvl_ft.data.conversation import Conversation, Image, Text
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.look.check_report import bars
from qwenvl_ft.look.forecast import histogram, quantiles
from qwenvl_ft.look.objects import all_objects
from qwenvl_ft.look.page import render
from qwenvl_ft.look.readable import TRAIN, find_split, open_splits, optional_encoder, sensible_workers
from qwenvl_ft.look.sample import Drawing, GroupLook
from qwenvl_ft.look.walk import walk
from qwenvl_ft.recipe.schema import Recipe

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019-][^\W_]+)*")
"""A word; where words are not spaced apart, a character."""
LONGEST_TEXT = 200
"""Characters of a text that are kept to show it; longer ones are told apart by their hash."""
MOST_COMMON = 20
"""Entries of a table."""

HISTOGRAMS = {
    "tokens": "tokens of a sample",
    "learned": "learned tokens of a sample",
    "vision": "image tokens of a sample",
    "answer_characters": "characters of an answer",
    "images": "images of a record",
    "longest_side": "longest side of an image, in pixels",
    "objects": "objects of a record that has any",
    "turns": "answers of a record",
}
"""Measure -> what it is; each is a list of numbers, one or several of a record."""
TABLES = {
    "classes": "classes of objects",
    "kinds": "kinds of objects",
    "answers": "answers",
    "prompts": "prompts",
    "words": "words of answers",
}
"""Count -> of what."""


@dataclass
class Counted:
    """What one record has; likewise all of them."""

    records: int = 0
    unread: int = 0
    """Records that no reader, or not the template, can read; nothing else counts them."""
    first_fault: str = ""
    numbers: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in HISTOGRAMS})
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in TABLES})
    datasets: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Counted") -> None:
        self.records += other.records
        self.unread += other.unread
        self.first_fault = self.first_fault or other.first_fault
        for name, values in other.numbers.items():
            self.numbers[name] += values
        for name, counts in other.counts.items():
            self.counts[name].update(counts)
        self.datasets.update(other.datasets)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "records": self.records,
            "unread": self.unread,
            "first_fault": self.first_fault or None,
            "datasets": dict(self.datasets),
            "measures": {name: _measure_told(values) for name, values in self.numbers.items() if values},
            "counts": {name: _count_told(counts) for name, counts in self.counts.items() if counts},
        }


def _measure_told(values: list[float]) -> dict[str, Any]:
    return {
        "count": len(values),
        "sum": sum(values),
        "mean": sum(values) / len(values),
        "quantiles": quantiles(values),
        "histogram": [{"from": low, "to": high, "count": count} for low, high, count in histogram(values)],
    }


def _count_told(counts: Counter[str]) -> dict[str, Any]:
    total = counts.total()
    return {
        "total": total,
        "different": len(counts),
        "most_common_share": counts.most_common(1)[0][1] / total,
        "most_common": dict(counts.most_common(MOST_COMMON)),
    }


class Census:
    """Counts records one by one; tokens too, if there is an encoder."""

    def __init__(self, policy: MediaPolicy, encoder: Encoder | None) -> None:
        self.policy = policy
        self.encoder = None if encoder is None else unlimited(encoder)

    def __call__(self, records: Any, index: int) -> Counted:
        found = Counted(records=1)
        try:
            record, source, root = records[index]
            found.datasets[source.dataset] += 1
            conversation = read_record(record, source, root)
            draft = self.encoder.draft(conversation) if self.encoder is not None else None
            self._count(conversation, found)
        except Exception as error:  # of any type: one record must not keep the others from being counted
            told = str(error) if isinstance(error, QwenVLError) else f"{type(error).__name__}: {error}"
            return Counted(records=1, unread=1, first_fault=told, datasets=found.datasets)
        if draft is not None:
            found.numbers["tokens"].append(draft.length)
            found.numbers["vision"].append(int(draft.counts[draft.widths > 0].sum()))
            found.numbers["learned"].append(int((draft.supervised * draft.counts)[1:].sum()))
        return found

    def _count(self, conversation: Conversation, found: Counted) -> None:
        images = conversation.media(Image)
        found.numbers["images"].append(len(images))
        try:
            found.numbers["longest_side"] += [max(image_size(image.value, self.policy)) for image in images]
        except DataError as error:
            raise DataError(f"{conversation.source}: {error}") from None
        answers = [told for told in texts(conversation, "assistant") if told]
        found.numbers["turns"].append(len(answers))
        found.numbers["answer_characters"] += map(len, answers)
        found.counts["answers"].update(map(shortened, answers))
        found.counts["prompts"].update(shortened(told) for told in texts(conversation, "user") if told)
        found.counts["words"].update(word.casefold() for told in answers for word in WORD.findall(told))
        named = [each.found for told in answers for each in all_objects(told) if each.found is not None]
        if named:
            found.numbers["objects"].append(len(named))
            found.counts["classes"].update(each.label or "(none)" for each in named)
            found.counts["kinds"].update(each.kind for each in named)


class Grouped:
    """The tokens of groups of dense captions, as the first epoch draws them; one that cannot be read has none."""

    def __init__(self, encoder: Encoder) -> None:
        self.look = GroupLook(unlimited(encoder), frozenset(), 0)

    def __call__(self, groups: DenseGroups, place: int) -> Counted:
        found, seen = Counted(), self.look(groups, place)
        if seen.kept:
            found.numbers["tokens"].append(seen.kept)
            found.numbers["vision"].append(seen.vision_tokens)
            found.numbers["learned"].append(seen.supervised)
        return found


def unlimited(encoder: Encoder) -> Encoder:
    """The encoder for counting what is too long as it is."""
    encoder = copy.copy(encoder)
    encoder.max_length = None
    return encoder


def texts(conversation: Conversation, role: str) -> list[str]:
    """The text of each message of a role, without its media; of answers, those that are learned."""
    return [
        "".join(part.text for part in message.content if isinstance(part, Text)).strip()
        for message in conversation.messages
        if message.role == role and message.loss is not False
    ]


def shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}... ({xxhash.xxh3_64_hexdigest(text.encode(errors='surrogatepass'))[:8]})"


def count_recipe(recipe: Recipe, *, split: str = TRAIN, num_proc: int | None = None, quiet: bool = False) -> Counted:
    """Count all records that a recipe selects, those that are left out of training too.

    Without ``model.model`` no tokens are counted.

    Raises:
        RecipeError: the recipe has no data, or no such split.
    """
    workers = num_proc or sensible_workers(recipe)
    opened = find_split(open_splits(recipe, num_proc=workers), split)
    policy, encoder, drawing = MediaPolicy.of(recipe.data), optional_encoder(recipe), Drawing.of(recipe)
    total = Counted()
    for fault in opened.faults:
        total.add(Counted(records=1, unread=1, first_fault=f"{fault.where}: {fault.message}"))
    for part in opened.parts:
        for records, epochs in drawing.parts(part, policy, training=split == TRAIN)[0]:
            grouped = isinstance(epochs, DenseGroups)
            census = Census(policy, None if grouped else encoder)
            for counted in walk(records, census, num_proc=workers, told=split, quiet=quiet):
                total.add(counted)
            if grouped and encoder is not None:
                for seen in walk(epochs, Grouped(encoder), num_proc=workers, told=f"{split}, groups", quiet=quiet):
                    total.add(seen)
    return total


def text(counted: Counted, shown: int = 10) -> str:
    """Everything on a terminal.

    Args:
        shown: entries of each table.
    """
    return "\n".join(_lines(counted, shown))


def _lines(counted: Counted, shown: int) -> Iterator[str]:
    yield f"{counted.records:,} records" + f", {unread(counted)}" * bool(counted.unread)
    if len(counted.datasets) > 1:
        yield from (f"    {name}: {count:,}" for name, count in counted.datasets.items())
    for name, told in HISTOGRAMS.items():
        values = counted.numbers[name]
        if values:
            middle = ", ".join(f"{key} {value:,g}" for key, value in quantiles(values).items())
            yield f"\n{told}: {sum(values):,g} in all, mean {sum(values) / len(values):,.1f}, {middle}"
            yield from bars(histogram(values))
    for name, told in TABLES.items():
        counts = counted.counts[name]
        if counts:
            total = counts.total()
            yield f"\n{told}: {total:,}, {len(counts):,} of them different"
            for entry, count in counts.most_common(shown):
                yield f"    {count:>8,} {count / total:>6.1%}  {' '.join(entry.split()):.90}"
            if len(counts) > shown:
                yield f"    ... and {len(counts) - shown:,} more"


def unread(counted: Counted) -> str:
    """How many records are not in the figures, and the first of them."""
    return f"{counted.unread:,} of them not counted (qwenvl-ft check says why); the first: {counted.first_fault}"


def write_page(counted: Counted, target: Path) -> Path:
    """Everything as a page with plots."""
    page = render(
        "stats.html.jinja",
        title="What is in the data",
        counted=counted,
        unread=unread(counted) if counted.unread else "",
        measures=[(told, counted.numbers[name]) for name, told in HISTOGRAMS.items() if counted.numbers[name]],
        tables=[(told, counted.counts[name]) for name, told in TABLES.items() if counted.counts[name]],
        most_common=MOST_COMMON,
        histogram=histogram,
        quantiles=quantiles,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
