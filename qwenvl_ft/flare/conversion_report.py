"""The report of all conversions into a folder: one entry per data set and split, and their sums.

A later conversion replaces the entries of the data sets and splits that it converts, and keeps the others.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_ft.flare.question_record import Tally

REPORT = "conversion_report.json"
CONVERTED, NOTHING, FAILED = LISTS = ("conversion_results", "not_found", "failed")
"""Lists of entries: converted files, splits without a record, files of questions that cannot be read."""

Key = tuple[str, str]
"""Data set and split of an entry."""


class Report:
    """Entries with ``dataset`` and ``split``, in the lists of `LISTS`, and their statistics."""

    def __init__(self) -> None:
        self.entries: dict[Key, tuple[str, dict[str, Any]]] = {}
        """(data set, split) -> (list, entry)."""

    @classmethod
    def read(cls, file: Path) -> "Report":
        """Read a report; a file that is missing or of another form gives an empty one."""
        report = cls()
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            for name in LISTS:
                for entry in stored[name]:
                    report.entries[entry["dataset"], entry["split"]] = (name, entry)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
        return report

    def add(self, kind: str, dataset: str, split: str, tally: Tally | None = None, **more: Any) -> None:
        """Add an entry to a list, in place of an older one of the same data set and split."""
        entry = {"dataset": dataset, "split": split, **more}
        if tally is not None:
            entry["statistics"] = tally.to_json()
        self.entries.pop((dataset, split), None)
        self.entries[dataset, split] = (kind, entry)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of a list."""
        return [entry for name, entry in self.entries.values() if name == kind]

    def part(self, keys: Iterable[Key]) -> "Report":
        """Return the report on some data sets and splits."""
        chosen = Report()
        chosen.entries = {key: self.entries[key] for key in keys if key in self.entries}
        return chosen

    def statistics(self) -> dict[str, Any]:
        """Return the sums over all entries."""
        return summed(entry["statistics"] for _, entry in self.entries.values() if "statistics" in entry)

    def notes(self) -> list[str]:
        return [note for _, entry in self.entries.values() for note in entry.get("notes", [])]

    def to_json(self) -> dict[str, Any]:
        """Return the report as its file holds it."""
        return {name: self.of(name) for name in LISTS} | {"statistics": self.statistics(), "notes": self.notes()}

    def lines(self) -> Iterator[str]:
        """Summarise the report on a few lines."""
        counts = self.statistics()
        converted, total = counts["converted_samples"], counts["total_samples"]
        yield f"converted {converted:,} of {total:,} questions, {len(self.of(CONVERTED))} files"
        yield from (f"  left out: {count:,} {reason}" for reason, count in counts["skipped_by_reason"].items())
        if counts["images_found_by_name"]:
            yield f"  images named without their folder, found by name: {counts['images_found_by_name']:,}"
        for how, count in counts["high_bit_depth_images"].items():
            yield f"  deeper than 8 bits, converted by {how}: {count:,} images"
        if counts["guessed_task_types"]:
            yield f"  task unknown, the data set's first task used: {counts['guessed_task_types']:,}"
        yield from (f"  {note}" for note in self.notes())
        if nothing := self.of(NOTHING):
            yield "  nothing for: " + ", ".join(f"{entry['dataset']} {entry['split']}" for entry in nothing)


def summed(statistics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the statistics of several splits, key by key."""
    total = Tally().to_json()
    for counts in statistics:
        for key, value in counts.items():
            if isinstance(value, dict):
                total[key] = dict(Counter(total[key]) + Counter(value))
            else:
                total[key] = total.get(key, 0) + value
    for key in ("skipped_by_reason", "task_type_distribution"):
        total[key] = dict(Counter(total[key]).most_common())
    total["image_count_distribution"] = dict(sorted(total["image_count_distribution"].items()))
    return total
