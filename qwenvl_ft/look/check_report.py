"""Text report of a check: faults by reason, lengths, the forecast of an epoch, the summary of all tests, the exit code.

Where the faults are comes first, and the first of them again at the end: a long histogram may stand between.
"""

from collections.abc import Iterable, Iterator

from qwenvl_ft.data.media.frames import first_frame_line
from qwenvl_ft.data.unread import tally_lines
from qwenvl_ft.look.check import Report, Split
from qwenvl_ft.look.faults import ANNOTATION, ERROR, IMAGE, MODEL, PARTS, REASONS, WARNING, Fault
from qwenvl_ft.look.forecast import Bar, histogram, quantiles
from qwenvl_ft.look.readable import TRAIN

SHOWN = 3
"""Cases printed per reason."""
BAR_WIDTH = 40
RULE = "=" * 60


def text(report: Report, shown: int = SHOWN) -> str:
    """Return the report without its `closing`.

    Args:
        shown: cases printed per reason.
    """
    blocks = (faults(report, shown), _splits(report), summary(report))
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)


def one_line(report: Report) -> str:
    """Return the error counts and the first error on one line; empty if there is no error."""
    errors = report.errors()
    if not errors:
        return ""
    counts = {reason: count for reason, count in report.counts().items() if report.levels[reason] == ERROR}
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    first = errors[0]
    total = f"{counted(len(errors), 'fault')} in {counted(report.records, 'record')}"
    return f"{total} ({found}); the first: {first.where}: {first.message}"


def faults(report: Report, shown: int = SHOWN) -> Iterator[str]:
    """Yield each reason that was found, followed by its first cases."""
    cases: dict[str, list[Fault]] = {}
    for fault in report.faults:
        cases.setdefault(fault.reason, []).append(fault)
    for reason, count in report.counts().items():
        yield f"{report.levels[reason]:<8} {reason:<13} {count:>8,}  {REASONS[reason].meaning}"
        for fault in cases[reason][:shown]:
            name = f" (id {fault.id!r})" if fault.id else ""
            yield f"           {fault.where}{name}: {fault.message}"
        if count > shown:
            yield f"           ... and {count - shown:,} more"


def _splits(report: Report) -> Iterator[str]:
    for name, split in report.splits.items():
        counts = {"record": split.records, "image": split.images, "video": split.videos}
        named = ", ".join(counted(count, kind) for kind, count in counts.items() if count or kind == "record")
        yield f"{name}: {named}, {len(split.media):,} different media"
        if len(split.datasets) > 1:
            yield from (f"    {dataset}: {count:,}" for dataset, count in split.datasets.items())
        if split.left_out:
            yield f"  left out for their false label (data.label=keep_true): {split.left_out:,}"
        yield from (f"  {line}" for line in tally_lines(split.unread))
        if set(split.modes) - {"RGB"}:
            yield f"  modes of image files: {', '.join(f'{mode} {n:,}' for mode, n in split.modes.most_common())}"
        for dataset, images in split.several_frames.items():
            yield f"  {first_frame_line(dataset, len(images), images[0])}"
        if split.groups:
            yield f"  {counted(split.groups, 'group')} of dense captions, as the first epoch draws them"
        if split.lengths:
            yield from lengths(split)
        if split.forecast is not None:
            yield from epoch(split)


def lengths(split: Split) -> list[str]:
    """Return the quantiles and the histogram of sample lengths."""
    summary = ", ".join(f"{name} {value:,}" for name, value in quantiles(split.lengths).items())
    return [f"  tokens per sample: {summary}", *bars(histogram(split.lengths))]


def bars(counted: list[Bar]) -> list[str]:
    """Draw a histogram, one bar a line; a bar that is not empty has at least one block."""
    most = max((count for _, _, count in counted), default=1)
    names = [f"{low:,g}" if high - low == 1 else f"{low:,g} ... {high:,g}" for low, high, _ in counted]
    width = max(map(len, names), default=0)
    return [
        f"    {name:>{width}}  {'█' * -(-count * BAR_WIDTH // most):<{BAR_WIDTH}}  {count:,}"
        for name, (_, _, count) in zip(names, counted, strict=True)
    ]


def epoch(split: Split) -> Iterator[str]:
    """Yield the forecast of an epoch over the samples."""
    expected = split.forecast
    assert expected is not None
    share = f"{expected.vision_share:.1%} from images and videos, {expected.supervised_share:.1%} supervised"
    yield f"  {counted(expected.samples, 'sample')}, {expected.tokens:,} tokens, {share}"
    if expected.fill is None:
        yield f"  no packing: {counted(expected.rows, 'row')} with one sample each"
    else:
        yield f"  packing: {counted(expected.rows, 'row')} of {expected.max_length:,} tokens, {expected.fill:.1%} full"
    if split.name == TRAIN:
        yield f"  steps per epoch: {expected.steps_per_epoch:,}, of {expected.step}"


def summary(report: Report) -> list[str]:
    """Return the verdicts on annotations, media and model."""
    verdict = {part: "PASSED" if report.passed(part) else "FAILED" for part in PARTS}
    if not report.model:
        verdict[MODEL] = "SKIPPED (no model given: nothing was tokenized)"
    splits = report.splits.values()
    names = {name for split in splits for name in split.datasets}
    warnings = len(report.faults) - len(report.errors())
    rate = f"{report.records / report.seconds:,.0f} records/s" if report.seconds else ""
    return [
        RULE,
        "TEST SUMMARY",
        RULE,
        f"Annotation Tests: {verdict[ANNOTATION]}",
        f"  Total samples: {report.records}",
        f"  Datasets: {len(names)}",
        *_media(report, verdict[IMAGE]),
        f"Model Tests: {verdict[MODEL]}",
        *([f"  Samples encoded with pixels: {sum(split.encoded for split in splits)}"] if report.model else []),
        f"Warnings: {warnings}",
        f"Time: {report.seconds:.1f} s, {rate}",
        RULE,
    ]


def _media(report: Report, verdict: str) -> Iterator[str]:
    """Yield the verdict on images and videos, by the names of those that the records have."""
    images, videos = (sum(getattr(split, kind) for split in report.splits.values()) for kind in ("images", "videos"))
    counts = report.counts()
    if not images and not videos and report.passed(IMAGE):
        yield "Image Tests: SKIPPED (no record has an image or a video)"
        return
    kinds = [name for name, count in (("Image", images), ("Video", videos)) if count] or ["Image"]
    yield f"{' and '.join(kinds)} Tests: {verdict}"
    if "Image" in kinds:
        yield f"  Images tested: {images}"
    if "Video" in kinds:
        yield f"  Videos tested: {videos}" + ("" if report.model else " (opened; frames are decoded only with a model)")
    yield f"  Missing: {_count(counts, 'missing')}"
    yield f"  Corrupted: {_count(counts, 'corrupt')}"
    if refused := _count(counts, "too_large") + _count(counts, "too_thin"):
        yield f"  Too large or too thin: {refused}"


def closing(reports: Iterable[Report], *, strict: bool = False) -> list[str]:
    """Return the last lines of the command: whether training can begin, and what the exit code means.

    Args:
        reports: one, or one for each phase.
        strict: count warnings as errors.
    """
    reports = list(reports)
    errors = [fault for report in reports for fault in report.errors()]
    warnings = [fault for report in reports for fault in report.faults if report.levels[fault.reason] == WARNING]
    wrong, kind, note = (errors, "error", "") if errors else (warnings if strict else [], "warning", " by --strict")
    if wrong:
        return [
            f"FAILED{note}: {counted(len(wrong), kind)}; the first: {wrong[0].where}: {wrong[0].message}",
            "Exit code 1: correct or remove these records, or accept a reason with --allow.",
        ]
    return [f"Exit code 0: no errors, {counted(len(warnings), 'warning')}.", "ALL TESTS PASSED - Ready for training"]


def counted(count: int, noun: str) -> str:
    """Return ``1 row`` or ``2 rows``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def _count(counts: dict[str, int], reason: str) -> int:
    return counts[reason] if reason in counts else 0
