"""Computes statistics of data: lengths, images, answers, objects, and how often texts repeat."""

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
from qwenvl_ft.data.media.images import MediaPolicy, image_size, stored_mode
from qwenvl_ft.data.plan.walk import walk
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.look import FIRST
from qwenvl_ft.look.check_report import bars
from qwenvl_ft.look.first_records import first_records
from qwenvl_ft.look.forecast import histogram, quantiles
from qwenvl_ft.look.objects import all_objects
from qwenvl_ft.look.page import render
from qwenvl_ft.look.readable import TRAIN, Opened, find_split, open_splits, optional_encoder, sensible_workers
from qwenvl_ft.look.sample import GroupInspector, SampleOptions
from qwenvl_ft.recipe.schema import Recipe

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019-][^\W_]+)*")
"""A word; in scripts without spaces between words, a character."""
LONGEST_TEXT = 200
"""Characters kept of a text; a hash distinguishes longer texts."""
MOST_COMMON = 20
"""Entries of a table in JSON and on the page."""

HISTOGRAMS = {
    "tokens": "tokens per sample",
    "learned": "supervised tokens per sample",
    "vision": "image tokens per sample",
    "answer_characters": "characters per answer",
    "images": "images per record",
    "longest_side": "longest side of an image, in pixels",
    "objects": "objects per record, records without objects left out",
    "turns": "answers per record",
}
"""Measure -> heading. A record adds one or several numbers to a measure."""
TABLES = {
    "modes": "what image files hold (a mode deeper than 8 bits is converted by data.high_bit_depth)",
    "classes": "classes of objects",
    "kinds": "kinds of objects",
    "answers": "answers",
    "prompts": "prompts",
    "words": "words of answers",
}
"""Count -> heading."""


@dataclass
class Counted:
    """Numbers and counts of one record, or summed over records."""

    records: int = 0
    unread: int = 0
    """Records that cannot be read or rendered; no other figure includes them."""
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

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as a dict that JSON can hold."""
        return {
            "records": self.records,
            "unread": self.unread,
            "first_fault": self.first_fault or None,
            "datasets": dict(self.datasets),
            "measures": {name: _measure_to_json(values) for name, values in self.numbers.items() if values},
            "counts": {name: _count_to_json(counts) for name, counts in self.counts.items() if counts},
        }


def _measure_to_json(values: list[float]) -> dict[str, Any]:
    return {
        "count": len(values),
        "sum": sum(values),
        "mean": sum(values) / len(values),
        "quantiles": quantiles(values),
        "histogram": [{"from": low, "to": high, "count": count} for low, high, count in histogram(values)],
    }


def _count_to_json(counts: Counter[str]) -> dict[str, Any]:
    total = counts.total()
    return {
        "total": total,
        "different": len(counts),
        "most_common_share": counts.most_common(1)[0][1] / total,
        "most_common": dict(counts.most_common(MOST_COMMON)),
    }


class Census:
    """Counts records one by one, including tokens if there is an encoder."""

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
        except Exception as error:  # any type: one record must not stop the count
            fault = str(error) if isinstance(error, QwenVLError) else f"{type(error).__name__}: {error}"
            return Counted(records=1, unread=1, first_fault=fault, datasets=found.datasets)
        if draft is not None:
            found.numbers["tokens"].append(draft.length)
            found.numbers["vision"].append(int(draft.counts[draft.widths > 0].sum()))
            found.numbers["learned"].append(int((draft.supervised * draft.counts)[1:].sum()))
        return found

    def _count(self, conversation: Conversation, found: Counted) -> None:
        images = conversation.media(Image)
        found.numbers["images"].append(len(images))
        try:
            for mode, deep in (stored_mode(image.value, self.policy) for image in images):
                found.counts["modes"][deep or mode or "(made by code)"] += 1
            found.numbers["longest_side"] += [max(image_size(image.value, self.policy)) for image in images]
        except DataError as error:
            raise DataError(f"{conversation.source}: {error}") from None
        answers = [answer for answer in texts(conversation, "assistant") if answer]
        found.numbers["turns"].append(len(answers))
        found.numbers["answer_characters"] += map(len, answers)
        found.counts["answers"].update(map(shortened, answers))
        found.counts["prompts"].update(shortened(prompt) for prompt in texts(conversation, "user") if prompt)
        found.counts["words"].update(word.casefold() for answer in answers for word in WORD.findall(answer))
        named = [each.found for answer in answers for each in all_objects(answer) if each.found is not None]
        if named:
            found.numbers["objects"].append(len(named))
            found.counts["classes"].update(each.label or "(none)" for each in named)
            found.counts["kinds"].update(each.kind for each in named)


class GroupCensus:
    """Counts the tokens of groups of dense captions, as the first epoch draws them; an unreadable group has none."""

    def __init__(self, encoder: Encoder) -> None:
        self.inspector = GroupInspector(unlimited(encoder), frozenset(), 0)

    def __call__(self, groups: DenseGroups, place: int) -> Counted:
        found, seen = Counted(), self.inspector(groups, place)
        if seen.kept:
            found.numbers["tokens"].append(seen.kept)
            found.numbers["vision"].append(seen.vision_tokens)
            found.numbers["learned"].append(seen.supervised)
        return found


def unlimited(encoder: Encoder) -> Encoder:
    """Return a copy of the encoder without ``max_length``, to count long samples in full."""
    encoder = copy.copy(encoder)
    encoder.max_length = None
    return encoder


def texts(conversation: Conversation, role: str) -> list[str]:
    """Return the text of each message of a role, without media; only supervised answers."""
    return [
        "".join(part.text for part in message.content if isinstance(part, Text)).strip()
        for message in conversation.messages
        if message.role == role and message.loss is not False
    ]


def shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}... ({xxhash.xxh3_64_hexdigest(text.encode(errors='surrogatepass'))[:8]})"


def count_recipe(
    recipe: Recipe, *, split: str = TRAIN, num_proc: int | None = None, quiet: bool = False, records: int = FIRST
) -> Counted:
    """Count all records that a recipe selects, including those that training drops; of a stream the first ones.

    Without ``model.model`` no tokens are counted.

    Args:
        records: number of records of a stream (``data.streaming``) that are counted.

    Raises:
        RecipeError: the recipe has no data, or no such split.
    """
    workers = num_proc or sensible_workers(recipe)
    with first_records(recipe, records) as first:
        opened = find_split(open_splits(recipe, num_proc=workers, first=first), split)
        return _counted(recipe, opened, split, workers, quiet)


def _counted(recipe: Recipe, opened: Opened, split: str, workers: int, quiet: bool) -> Counted:
    policy, encoder, sample_options = MediaPolicy.of(recipe.data), optional_encoder(recipe), SampleOptions.of(recipe)
    total = Counted()
    for fault in opened.faults:
        total.add(Counted(records=1, unread=1, first_fault=f"{fault.where}: {fault.message}"))
    for part in opened.parts:
        for records, epochs in sample_options.parts(part, policy, training=split == TRAIN)[0]:
            grouped = isinstance(epochs, DenseGroups)
            census = Census(policy, None if grouped else encoder)
            for counted in walk(records, census, num_proc=workers, label=split, quiet=quiet):
                total.add(counted)
            if grouped and encoder is not None:
                for seen in walk(epochs, GroupCensus(encoder), num_proc=workers, label=f"{split}, groups", quiet=quiet):
                    total.add(seen)
    return total


def text(counted: Counted, shown: int = 10) -> str:
    """Return the statistics as text.

    Args:
        shown: entries printed per table.
    """
    return "\n".join(_lines(counted, shown))


def _lines(counted: Counted, shown: int) -> Iterator[str]:
    yield f"{counted.records:,} records" + f", {unread(counted)}" * bool(counted.unread)
    if len(counted.datasets) > 1:
        yield from (f"    {name}: {count:,}" for name, count in counted.datasets.items())
    for name, heading in HISTOGRAMS.items():
        values = counted.numbers[name]
        if values:
            middle = ", ".join(f"{key} {value:,g}" for key, value in quantiles(values).items())
            yield f"\n{heading}: total {sum(values):,g}, mean {sum(values) / len(values):,.1f}, {middle}"
            yield from bars(histogram(values))
    for name, heading in TABLES.items():
        counts = counted.counts[name]
        if counts:
            total = counts.total()
            yield f"\n{heading}: {total:,}, {len(counts):,} distinct"
            for entry, count in counts.most_common(shown):
                yield f"    {count:>8,} {count / total:>6.1%}  {' '.join(entry.split()):.90}"
            if len(counts) > shown:
                yield f"    ... and {len(counts) - shown:,} more"


def unread(counted: Counted) -> str:
    """Return the number of records that are not counted, and the first fault."""
    return f"{counted.unread:,} of them not counted (run qwenvl-ft check for details); the first: {counted.first_fault}"


def write_page(counted: Counted, target: Path) -> Path:
    """Write the statistics as a page with plots."""
    page = render(
        "stats.html.jinja",
        title="Statistics of the data",
        counted=counted,
        unread=unread(counted) if counted.unread else "",
        measures=[(heading, counted.numbers[name]) for name, heading in HISTOGRAMS.items() if counted.numbers[name]],
        tables=[(heading, counted.counts[name]) for name, heading in TABLES.items() if counted.counts[name]],
        most_common=MOST_COMMON,
        histogram=histogram,
        quantiles=quantiles,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
