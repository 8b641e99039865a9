"""Converts FLARE25's questions to training files, one per data set and split.

    qwenvl-ft convert flare                                        # the five starter sets, train and val
    qwenvl-ft convert flare --all --input_dir organized_dataset
    qwenvl-ft convert flare --datasets neojaundice retino --splits train --verbose

Every image is decoded once, so that a damaged one is found here and not hours into a run. Skipped questions are counted
by reason in ``conversion_report.json``, which keeps the counts of data sets that were converted earlier, and listed one
by one in ``conversion.log``.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.reading import REFUSING, reading_of
from qwenvl_ft.errors import DataError, hint
from qwenvl_ft.flare.catalog import (
    FLARE_DATASETS,
    SPLITS,
    converted_file,
    find_datasets,
    registry_name,
)
from qwenvl_ft.flare.command import add_data_options, add_image_limit, add_reading_options, run_command
from qwenvl_ft.flare.conversion_report import CONVERTED, FAILED, NOTHING, REPORT, Report
from qwenvl_ft.flare.image_check import CHECKS, ImageCheck
from qwenvl_ft.flare.layout import Questions, find_base, find_questions, unpacking_hint
from qwenvl_ft.flare.question_record import COORDINATES, Options, convert_questions

LOG = "conversion.log"
MAX_ERRORS = 50
"""Most skipped questions listed in the report per data set and split; the log lists all."""

log = logging.getLogger("qwenvl_ft.flare")


def convert(
    names: Iterable[str],
    splits: Iterable[str] = ("train", "val"),
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    options: Options | None = None,
) -> Report:
    """Convert data sets; write their files and the report. A file that cannot be read does not stop the others.

    Args:
        names: names in the catalog.
        base: the folder ``organized_dataset``; None looks in the working directory and one level up.
        output: output folder; None is ``converted_data`` beside ``base``.

    Returns:
        The report on all that was ever converted into the folder.

    Raises:
        DataError: the folder or a split does not exist.
    """
    options, splits = options or Options(), list(splits)
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}.{hint(split, SPLITS)}")
    root = find_base(base)
    folder = output_folder(root, output)
    folder.mkdir(parents=True, exist_ok=True)
    policy = MediaPolicy(max_image_pixels=options.max_image_pixels, reading=options.reading)
    check, report = ImageCheck(options.check_images, policy), Report.read(folder / REPORT)
    for name in names:
        for split in splits:
            try:
                questions = find_questions(root, FLARE_DATASETS[name], split)
            except DataError as error:
                report.add(FAILED, name, split, why=str(error))
                log.error("%s %s: %s", name, split, error)
                continue
            if questions is None:
                report.add(NOTHING, name, split)
                log.warning("%s %s: no questions below %s", name, split, root)
            else:
                _convert_split(questions, folder, options, check, report)
    write_json(folder / REPORT, report.to_json())
    return report


def _convert_split(questions: Questions, folder: Path, options: Options, check: ImageCheck, report: Report) -> None:
    records, tally = convert_questions(questions, options, check)
    name, split = questions.dataset.name, questions.split
    notes = [f"{passed} holds no answers; {questions.file} is used instead" for passed in questions.passed_over]
    if records:
        target = folder / converted_file(name, split)
        write_records(target, records)
        result = {"samples": len(records), "output_file": str(target), "notes": notes}
        errors = {"skipped": dict(tally.skipped), "errors": tally.errors[:MAX_ERRORS]}
        report.add(CONVERTED, name, split, tally, **result, **errors)
    else:
        why = unpacking_hint(questions.folder) or "no question became a record"
        report.add(NOTHING, name, split, tally, file=str(questions.file), why=why, notes=notes)
        log.warning("%s %s: %s", name, split, why)
    skipped = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.most_common())
    log.info(
        "%s %s: %d of %d converted%s", name, split, len(records), tally.total_samples, f" ({skipped})" * bool(skipped)
    )


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON list with one record per line; the file is replaced atomically."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    _write(path, f"[\n{lines}\n]\n")


def write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own escape of half a character
    partial.replace(path)


def output_folder(base: Path, output: str | Path | None) -> Path:
    """Return the folder as output, or ``converted_data`` beside the data."""
    return Path(output) if output is not None else Path(os.path.normpath(base.parent)) / "converted_data"


def listing() -> str:
    """Return the catalog as a table: data set, name in recipes, category, tasks; starter sets are marked."""
    rows = [
        (f"{name}{' *' * entry.is_starter}", registry_name(name), entry.category, ", ".join(entry.task_types))
        for name, entry in FLARE_DATASETS.items()
    ]
    rows.insert(0, ("data set", "in recipes", "category", "tasks"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n* starter set"


def parser(prog: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=prog, description="Convert FLARE25 questions to training records.")
    add_data_options(options, input_help="the data (default: organized_dataset, here or one level up)")
    options.add_argument("--all", action="store_true", help="every data set of the catalog")
    options.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="train, val, test")
    options.add_argument(
        "--output_dir", "--converted_dir", metavar="DIR", help="default: converted_data beside the input"
    )
    options.add_argument("--coordinates", default="pixel", help=f"unit of boxes: {' or '.join(COORDINATES)}")
    options.add_argument("--check_images", default="decode", help=", ".join(CHECKS))
    add_image_limit(options)
    options.add_argument("--keep_incomplete", action="store_true", help="keep questions with some unusable images")
    options.add_argument("--num_workers", type=int, default=4, help="threads that check images")
    add_reading_options(options, default="error")
    options.add_argument("--list", action="store_true", help="print the catalog and exit")
    options.add_argument("--verbose", action="store_true", help="print every skipped question")
    return options


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(listing())
        return 0
    names = find_datasets(["all"] if arguments.all else arguments.datasets)
    options = Options(
        coordinates=arguments.coordinates,
        check_images=arguments.check_images,
        keep_incomplete=arguments.keep_incomplete,
        num_workers=arguments.num_workers,
        max_image_pixels=arguments.max_image_pixels,
        reading=reading_of(vars(arguments), "--").over(REFUSING),
    )
    base = find_base(arguments.input_dir)
    folder = output_folder(base, arguments.output_dir)
    with logging_to(folder / LOG, verbose=arguments.verbose):
        report = convert(names, arguments.splits, base=base, output=folder, options=options)
    now = report.part((name, split) for name in names for split in arguments.splits)
    print("\n".join(now.lines()))
    print(f"report: {folder / REPORT}, log: {folder / LOG}")
    converted = {entry["dataset"] for entry in now.of(CONVERTED)}
    without = [name for name in names if name not in converted]
    for entry in now.of(FAILED):
        print(f"error: {entry['dataset']} {entry['split']}: {entry['why']}", file=sys.stderr)
    if without:
        print(f"error: nothing was converted of {', '.join(without)}", file=sys.stderr)
    return 1 if without or now.of(FAILED) else 0


@contextmanager
def logging_to(file: Path, *, verbose: bool) -> Iterator[None]:
    """Add everything to a log file, and write results to stdout; with ``verbose`` also every skipped question."""
    file.parent.mkdir(parents=True, exist_ok=True)
    into_file, onto_screen = (
        logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"),
        logging.StreamHandler(sys.stdout),
    )
    into_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    onto_screen.setLevel(logging.DEBUG if verbose else logging.INFO)
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in (into_file, onto_screen):
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in (into_file, onto_screen):
            log.removeHandler(handler)
        into_file.close()
        log.setLevel(before[0])
        log.propagate = before[1]


def main(argv: list[str] | None = None, prog: str = "qwenvl-ft convert flare") -> int:
    """Run the command: exit code 0, 1 if a data set gave no file or a file is malformed, 2 for a user's error."""
    return run_command(run, parser(prog).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
