"""Is the data fit for training? Checks every record of a recipe or of data files.

report = check_recipe(load_recipe("mine"))
report.ok, report.counts(), report.faults
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.plan.walk import walk
from qwenvl_ft.data.sources.records import Records
from qwenvl_ft.data.unread import Tally, tally
from qwenvl_ft.errors import unknown_name
from qwenvl_ft.look import FIRST
from qwenvl_ft.look.faults import ERROR, IMAGE, MODEL, PARTS, REASONS, WARNING, Fault
from qwenvl_ft.look.first_records import first_records
from qwenvl_ft.look.forecast import Forecast, forecast, histogram
from qwenvl_ft.look.one_record import Inspected, Inspector
from qwenvl_ft.look.readable import TRAIN, open_splits, optional_encoder, sensible_workers
from qwenvl_ft.look.reference import reference_encoder
from qwenvl_ft.look.sample import GroupInspector, Measured, SampleOptions
from qwenvl_ft.recipe.schema import Recipe

ENCODED = 5
"""Records per data set, and groups, that are fully encoded with pixels, as in training."""
UNFIT = ("json", "structure", "tags", "geometry", "unforeseen", *(n for n, r in REASONS.items() if r.part == IMAGE))
"""Reasons that make a record's whole group unusable."""


@dataclass
class Split:
    """Counts over the training data or over one validation set."""

    name: str
    records: int = 0
    images: int = 0
    """Images in all records; an image that occurs twice counts twice."""
    videos: int = 0
    """Videos in all records, likewise."""
    media: set[bytes] = field(default_factory=set)
    """Content hashes of all media."""
    datasets: Counter[str] = field(default_factory=Counter)
    """Data set -> number of records."""
    modes: Counter[str] = field(default_factory=Counter)
    """What image files hold (``RGB``, ``I;16``) -> number of images."""
    several_frames: dict[str, list[str]] = field(default_factory=dict)
    """Data set -> its images of several frames or pages of which none was chosen."""
    encoded: int = 0
    groups: int = 0
    """Groups of dense captions; each group is one sample."""
    lengths: list[int] = field(default_factory=list)
    """Full length of each sample in tokens, including samples that will be dropped or truncated."""
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """(tokens, image tokens, supervised tokens) of each sample that is trained on."""
    unread: dict[str, Tally] = field(default_factory=dict)
    """Keys of its records that hold something and are read by nothing."""
    left_out: int = 0
    """Records that are left out for their label."""
    forecast: Forecast | None = None
    """Forecast of an epoch over its samples."""

    def add(self, seen: Inspected) -> None:
        """Count a record, and its sample if the record is a sample by itself."""
        self.records += 1
        self.images += seen.num_images
        self.videos += seen.num_videos
        self.media.update(seen.media)
        if seen.dataset:  # a damaged row does not know its data set
            self.datasets[seen.dataset] += 1
        tally(self.unread, seen.unread, f"{seen.where} (id {seen.id!r})" if seen.id else seen.where)
        self.modes.update(seen.modes)
        if seen.several_frames:
            self.several_frames.setdefault(seen.dataset, []).extend(seen.several_frames)
        self.measure(seen)

    def measure(self, seen: Measured) -> None:
        """Count a sample."""
        self.encoded += seen.encoded
        if seen.tokens:
            self.lengths.append(seen.tokens)
        if seen.kept:
            self.samples.append((seen.kept, seen.vision_tokens, seen.supervised))


@dataclass
class Report:
    """Everything that a check found."""

    splits: dict[str, Split]
    faults: list[Fault]
    levels: dict[str, str]
    """Reason -> ``error`` or ``warning``."""
    model: str
    """Model whose tokenizer was used; empty if nothing was tokenized."""
    seconds: float = 0.0
    """Duration of the check, not counting the loading of the processor."""

    @property
    def ok(self) -> bool:
        """True if there is no error; warnings do not count."""
        return not self.errors()

    def exit_code(self, *, strict: bool = False) -> int:
        """Return the exit code of ``check``: 1 if there is an error, or with ``strict`` a warning, else 0."""
        return int(not self.ok or (strict and bool(self.faults)))

    def errors(self) -> list[Fault]:
        return [fault for fault in self.faults if self.levels[fault.reason] == ERROR]

    def counts(self) -> dict[str, int]:
        """Reason -> number of cases, in the order of `REASONS`."""
        found = Counter(fault.reason for fault in self.faults)
        return {reason: found[reason] for reason in REASONS if found[reason]}

    @property
    def records(self) -> int:
        return sum(split.records for split in self.splits.values())

    def passed(self, part: str) -> bool:
        """Return True if one of the three tests (``Annotation``, ``Image``, ``Model``) found no error."""
        return not any(REASONS[fault.reason].part == part for fault in self.errors())

    def to_json(self, *, strict: bool = False) -> dict[str, Any]:
        """Return the report as a dict that JSON can hold.

        Args:
            strict: count warnings as errors in ``exit_code``.
        """
        cases: dict[str, list[dict[str, str]]] = {}
        for fault in self.faults:
            case = asdict(fault)
            cases.setdefault(case.pop("reason"), []).append(case)
        return {
            "ok": self.ok,
            "exit_code": self.exit_code(strict=strict),
            "errors": len(self.errors()),
            "warnings": len(self.faults) - len(self.errors()),
            "tests": {part: self.passed(part) if self.model or part != MODEL else None for part in PARTS},
            "records": self.records,
            "seconds": round(self.seconds, 3),
            "records_per_second": round(self.records / self.seconds, 1) if self.seconds else None,
            "model": self.model or None,
            "splits": {name: _split_to_json(split) for name, split in self.splits.items()},
            "faults": {
                reason: {"level": self.levels[reason], "count": count, "meaning": REASONS[reason].meaning}
                | {"cases": cases[reason]}
                for reason, count in self.counts().items()
            },
        }


def _split_to_json(split: Split) -> dict[str, Any]:
    return {
        "records": split.records,
        "datasets": dict(split.datasets),
        "images": split.images,
        "videos": split.videos,
        "different_media": len(split.media),
        "modes": dict(split.modes.most_common()),
        "several_frames": {name: len(images) for name, images in split.several_frames.items()},
        "groups": split.groups,
        "encoded": split.encoded,
        "left_out_by_label": split.left_out,
        "unread_keys": {path: entry._asdict() for path, entry in split.unread.items()},
        "lengths": [{"from": low, "to": high, "count": count} for low, high, count in histogram(split.lengths)],
        "epoch": asdict(split.forecast) if split.forecast else None,
    }


def check_recipe(
    recipe: Recipe,
    *,
    allow: Iterable[str] = (),
    processes: int = 1,
    num_proc: int | None = None,
    quiet: bool = False,
    records: int = FIRST,
) -> Report:
    """Check every record that a recipe trains or evaluates on; of a stream the first ones, without a forecast.

    Without ``model.model`` nothing is tokenized; everything else is checked, by Qwen3-VL's rules.

    Args:
        allow: reasons to report as warnings.
        processes: GPUs of the planned run, from which the number of steps follows.
        num_proc: worker processes; None is ``data.dataset_num_proc``, limited to the number of cores.
        quiet: show no progress bar.
        records: number of records of a stream (``data.streaming``) that are checked.

    Raises:
        RecipeError: a reason in ``allow`` is unknown, there is no data, or the recipe's model or template is wrong.
    """
    levels = _levels(recipe.template.truncation_strategy, allow)
    how = {"num_proc": num_proc or sensible_workers(recipe), "quiet": quiet}
    with first_records(recipe, records) as first:
        return _checked(recipe, first, levels, processes, how)


def _checked(
    recipe: Recipe, first: Records | None, levels: dict[str, str], processes: int, how: dict[str, Any]
) -> Report:
    """Check a recipe's records; see `check_recipe`.

    Args:
        first: those of its stream, if it has one.
        how: options of `walk`.
    """
    encoder, policy = optional_encoder(recipe), MediaPolicy.of(recipe.data)
    reference = encoder or reference_encoder(recipe)
    sample_options = SampleOptions.of(recipe)
    start = perf_counter()
    report = Report({}, [], levels, recipe.model.model)
    first_seen: dict[str, FirstSeen] = {}
    for name, opened in open_splits(recipe, num_proc=how["num_proc"], first=first).items():
        report.faults += opened.faults
        split, first_seen[name] = Split(name), FirstSeen(first_seen[TRAIN] if TRAIN in first_seen else None)
        for part in opened.parts:
            split.left_out += part.left_out()
            parts, fault = sample_options.parts(part, policy, training=name == TRAIN)
            report.faults += [fault] if fault else []
            for records, epochs in parts:
                inspector = Inspector(
                    reference,
                    count=encoder is not None,
                    encode=first_places(records.summary()),
                    epochs=epochs,
                    summaries=sample_options.summaries,
                )
                report.faults += _check_records(split, first_seen[name], records, inspector, **how)
        if split.samples and not (recipe.data.streaming and name == TRAIN):
            split.forecast = forecast(recipe, *zip(*split.samples, strict=True), processes=processes)
        report.splits[name] = split
    report.seconds = perf_counter() - start
    return report


def _check_records(
    split: Split, first_seen: "FirstSeen", records: Any, inspector: Inspector, **how: Any
) -> Iterator[Fault]:
    """Check records one by one, then the groups of dense captions whose records are all sound.

    Args:
        how: options of `walk`.
    """
    unfit: list[int] = []
    for index, seen in enumerate(walk(records, inspector, label=split.name, **how)):
        split.add(seen)
        yield from first_seen.new(seen)
        if any(fault.reason in UNFIT for fault in seen.faults):
            unfit.append(index)
    groups = inspector.epochs
    if inspector.sample is not None and isinstance(groups, DenseGroups):
        split.groups += len(groups)
        look = GroupInspector(inspector.sample.encoder, frozenset(unfit), ENCODED)
        for measured in walk(groups, look, label=f"{split.name}, groups", **how):
            split.measure(measured)
            yield from first_seen.unreported(measured.faults)


class FirstSeen:
    """Remembers where each content was first seen, to find duplicates and leaks.

    Args:
        trained: the `FirstSeen` of the training data, while validation data is checked.
    """

    def __init__(self, trained: "FirstSeen | None" = None) -> None:
        self.trained = trained
        self.records: dict[bytes, str] = {}
        self.media: dict[bytes, str] = {}
        self.reported: set[Fault] = set()

    def new(self, seen: Inspected) -> list[Fault]:
        """Return the faults of a record that were not reported yet, including duplicates and leaks.

        A record that is drawn twice is reported once, and does not count as its own duplicate.
        """
        repeated = [Fault(reason, seen.where, message, seen.id) for reason, message in self._repetitions(seen)]
        return self.unreported(seen.faults + repeated)

    def unreported(self, faults: list[Fault]) -> list[Fault]:
        """Return the faults that were not reported yet, and remember them."""
        faults = [fault for fault in faults if fault not in self.reported]
        self.reported.update(faults)
        return faults

    def _repetitions(self, seen: Inspected) -> Iterator[tuple[str, str]]:
        """Yield (reason, message) for content that occurred before."""
        if not seen.key:
            return
        home = self.records.setdefault(seen.key, seen.where)
        if home != seen.where:
            yield "duplicate", f"the same as {home}"
        for key in seen.media:
            self.media.setdefault(key, seen.where)
        if self.trained is None:
            return
        if seen.key in self.trained.records:
            yield "leak_record", f"the same as {self.trained.records[seen.key]} in the training data"
            return
        shared = next((key for key in seen.media if key in self.trained.media), None)
        if shared is not None:
            yield "leak_media", f"shares a medium with {self.trained.media[shared]} in the training data"


def first_places(summary: dict[str, int]) -> frozenset[int]:
    """Return the indices of the first `ENCODED` records of each data set.

    Args:
        summary: data set -> number of records, in the order of the records.
    """
    starts = np.cumsum([0, *summary.values()]).tolist()
    return frozenset(
        start + k for start, count in zip(starts, summary.values(), strict=False) for k in range(min(ENCODED, count))
    )


def _levels(strategy: str, allow: Iterable[str]) -> dict[str, str]:
    """Return the level of each reason for this recipe: reason -> ``error`` or ``warning``."""
    levels = {name: reason.level for name, reason in REASONS.items()}
    if strategy == "raise":
        levels["too_long"] = ERROR
    for name in allow:
        if name not in REASONS:
            raise unknown_name("reason to allow", name, REASONS)
        levels[name] = WARNING
    return levels
