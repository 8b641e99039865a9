"""Is data fit to train on? Every record of a recipe, or of files by themselves, looked at from every side.

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
from qwenvl_ft.errors import unknown_name
from qwenvl_ft.look.faults import ERROR, REASONS, WARNING, Fault
from qwenvl_ft.look.forecast import Forecast, forecast, histogram
from qwenvl_ft.look.one_record import Inspected, Inspector
from qwenvl_ft.look.readable import TRAIN, open_splits, optional_encoder, sensible_workers
from qwenvl_ft.look.sample import Drawing, GroupLook, Measured
from qwenvl_ft.look.walk import walk
from qwenvl_ft.recipe.schema import Recipe

ENCODED = 5
"""Records of each data set, and groups, that are made samples with their pixels, as training makes them."""


UNFIT = ("json", "structure", "tags", "geometry", "missing", "corrupt", "size", "unforeseen")
"""Faults of a record that keep its group from being a sample."""


@dataclass
class Split:
    """Training data, or a validation set."""

    name: str
    records: int = 0
    images: int = 0
    """Shown in records; an image that is shown twice counts twice."""
    media: set[bytes] = field(default_factory=set)
    """Keys of the content of all media."""
    datasets: Counter[str] = field(default_factory=Counter)
    """Data set -> records."""
    encoded: int = 0
    groups: int = 0
    """Of dense captions: each is a sample."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample, those that are left out or cut too, as they would be whole."""
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each sample that is trained on: tokens, those of images, those that are learned."""
    forecast: Forecast | None = None
    """Of an epoch over its samples."""

    def add(self, seen: Inspected) -> None:
        """A record, and its sample if it becomes one by itself."""
        self.records += 1
        self.images += seen.num_images
        self.media.update(seen.media)
        self.datasets[seen.dataset] += 1
        self.measure(seen)

    def measure(self, seen: Measured) -> None:
        """A sample."""
        self.encoded += seen.encoded
        if seen.tokens:
            self.lengths.append(seen.tokens)
        if seen.kept:
            self.samples.append((seen.kept, seen.vision_tokens, seen.supervised))


@dataclass
class Report:
    """All that was found."""

    splits: dict[str, Split]
    faults: list[Fault]
    levels: dict[str, str]
    """Reason -> ``error`` or ``warning``."""
    model: str
    """Empty: nothing was tokenized."""
    seconds: float = 0.0
    """Of looking, after the processor was loaded."""

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors()

    def errors(self) -> list[Fault]:
        return [fault for fault in self.faults if self.levels[fault.reason] == ERROR]

    def counts(self) -> dict[str, int]:
        """Reason -> cases, in the order of `REASONS`."""
        found = Counter(fault.reason for fault in self.faults)
        return {reason: found[reason] for reason in REASONS if found[reason]}

    @property
    def records(self) -> int:
        return sum(split.records for split in self.splits.values())

    def passed(self, part: str) -> bool:
        """Whether one of the three tests (``Annotation``, ``Image``, ``Model``) found no error."""
        return not any(REASONS[fault.reason].part == part for fault in self.errors())

    def told(self) -> dict[str, Any]:
        """As JSON."""
        cases: dict[str, list[dict[str, str]]] = {}
        for fault in self.faults:
            case = asdict(fault)
            cases.setdefault(case.pop("reason"), []).append(case)
        return {
            "ok": self.ok,
            "records": self.records,
            "seconds": round(self.seconds, 3),
            "records_per_second": round(self.records / self.seconds, 1) if self.seconds else None,
            "model": self.model or None,
            "splits": {name: _split_told(split) for name, split in self.splits.items()},
            "faults": {
                reason: {"level": self.levels[reason], "count": count, "told": REASONS[reason].told}
                | {"cases": cases[reason]}
                for reason, count in self.counts().items()
            },
        }


def _split_told(split: Split) -> dict[str, Any]:
    return {
        "records": split.records,
        "datasets": dict(split.datasets),
        "images": split.images,
        "different_media": len(split.media),
        "groups": split.groups,
        "encoded": split.encoded,
        "lengths": [{"from": low, "to": high, "count": count} for low, high, count in histogram(split.lengths)],
        "epoch": asdict(split.forecast) if split.forecast else None,
    }


def check_recipe(
    recipe: Recipe, *, allow: Iterable[str] = (), processes: int = 1, num_proc: int | None = None, quiet: bool = False
) -> Report:
    """Look at every record that a recipe trains and evaluates on.

    Without ``model.model`` nothing is tokenized; all else is looked at.

    Args:
        allow: reasons that are warnings here.
        processes: GPUs of the run, for its number of steps.
        num_proc: processes that look; None is ``data.dataset_num_proc``, as far as there are cores.
        quiet: no progress bar.

    Raises:
        RecipeError: an unknown reason, no data, or what the recipe says of model and template is wrong.
    """
    levels = _levels(recipe.template.truncation_strategy, allow)
    workers = num_proc or sensible_workers(recipe)
    encoder, policy = optional_encoder(recipe), MediaPolicy.of(recipe.data)
    drawing = Drawing.of(recipe)
    start = perf_counter()
    report = Report({}, [], levels, recipe.model.model)
    homes: dict[str, Homes] = {}
    for name, opened in open_splits(recipe, num_proc=workers).items():
        report.faults += opened.faults
        split, homes[name] = Split(name), Homes(homes[TRAIN] if TRAIN in homes else None)
        for part in opened.parts:
            parts, fault = drawing.parts(part, policy, training=name == TRAIN)
            report.faults += [fault] if fault else []
            for records, epochs in parts:
                inspector = Inspector(policy, encoder, first_places(records.summary()), epochs, drawing.summaries)
                report.faults += _looked(split, homes[name], records, inspector, num_proc=workers, quiet=quiet)
        if split.samples:
            split.forecast = forecast(recipe, *zip(*split.samples, strict=True), processes=processes)
        report.splits[name] = split
    report.seconds = perf_counter() - start
    return report


def _looked(split: Split, homes: "Homes", records: Any, inspector: Inspector, **how: Any) -> Iterator[Fault]:
    """Look at records one by one and then, of dense captions, at the groups of those that are sound.

    Args:
        how: of `walk`.
    """
    unfit: list[int] = []
    for index, seen in enumerate(walk(records, inspector, told=split.name, **how)):
        split.add(seen)
        yield from homes.new(seen)
        if any(fault.reason in UNFIT for fault in seen.faults):
            unfit.append(index)
    groups = inspector.epochs
    if inspector.sample is not None and isinstance(groups, DenseGroups):
        split.groups += len(groups)
        look = GroupLook(inspector.sample.encoder, frozenset(unfit), ENCODED)
        for told in walk(groups, look, told=f"{split.name}, groups", **how):
            split.measure(told)
            yield from homes.untold(told.faults)


class Homes:
    """Where content was first seen, to find it again.

    Args:
        trained: the training data's, while validation data is looked at.
    """

    def __init__(self, trained: "Homes | None" = None) -> None:
        self.trained = trained
        self.records: dict[bytes, str] = {}
        self.media: dict[bytes, str] = {}
        self.told: set[Fault] = set()

    def new(self, seen: Inspected) -> list[Fault]:
        """A record's faults that were not told yet, those that only show beside others among them.

        A record that is drawn twice is told once, and is no duplicate of itself.
        """
        return self.untold(
            seen.faults + [Fault(reason, seen.where, told, seen.id) for reason, told in self._again(seen)]
        )

    def untold(self, faults: list[Fault]) -> list[Fault]:
        """Those that were not told yet."""
        faults = [fault for fault in faults if fault not in self.told]
        self.told.update(faults)
        return faults

    def _again(self, seen: Inspected) -> Iterator[tuple[str, str]]:
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
            yield "leak_media", f"shows what {self.trained.media[shared]} in the training data shows"


def first_places(summary: dict[str, int]) -> frozenset[int]:
    """Indices of the first records of each data set.

    Args:
        summary: data set -> its number of records, in their order.
    """
    starts = np.cumsum([0, *summary.values()]).tolist()
    return frozenset(
        start + k for start, count in zip(starts, summary.values(), strict=False) for k in range(min(ENCODED, count))
    )


def _levels(strategy: str, allow: Iterable[str]) -> dict[str, str]:
    """How bad each reason is in this run."""
    levels = {name: reason.level for name, reason in REASONS.items()}
    if strategy == "raise":
        levels["too_long"] = ERROR
    for name in allow:
        if name not in REASONS:
            raise unknown_name("reason to allow", name, REASONS)
        levels[name] = WARNING
    return levels
