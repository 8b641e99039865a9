"""FLARE25's questions -> training files, one for each data set and split.

    qwenvl-ft convert flare                                        # the five starter sets, train and val
    qwenvl-ft convert flare --all --input_dir organized_dataset
    qwenvl-ft convert flare --datasets neojaundice retino --splits train --verbose

Every image is decoded once, so that a damaged one is found here and not hours into a run. What is left out is counted
by reason in ``conversion_report.json`` and named, record by record, in ``conversion.log``.
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

from qwenvl_ft.errors import DataError, QwenVLError, hint
from qwenvl_ft.flare.catalog import (
    FLARE_DATASETS,
    SPLITS,
    converted_file,
    find_datasets,
    read_catalog,
    registry_name,
)
from qwenvl_ft.flare.layout import Questions, find_base, find_questions, unpacking_hint
from qwenvl_ft.flare.records import CHECKS, COORDINATES, ImageCheck, Options, Tally, convert_questions

REPORT, LOG = "conversion_report.json", "conversion.log"
MAX_ERRORS = 50
"""Records left out that the report names, for each data set and split; the log names all."""

log = logging.getLogger("qwenvl_ft.flare")


def convert(
    names: Iterable[str],
    splits: Iterable[str] = ("train", "val"),
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Convert data sets and write their files, the report and the log.

    Args:
        names: of the catalog.
        base: the folder ``organized_dataset``; None looks here and one level up.
        output: None is ``converted_data`` beside it.

    Returns:
        The report: ``conversion_results``, ``statistics``, ``not_found`` and ``notes``.

    Raises:
        DataError: there is no such folder, or a file of questions is not one.
    """
    options, splits = options or Options(), list(splits)
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}.{hint(split, SPLITS)}")
    root = find_base(base)
    folder = output_folder(root, output)
    folder.mkdir(parents=True, exist_ok=True)
    check, total = ImageCheck(options.check_images), Tally()
    told: dict[str, Any] = {"conversion_results": [], "statistics": {}, "not_found": [], "notes": []}
    for name in names:
        for split in splits:
            questions = find_questions(root, FLARE_DATASETS[name], split)
            if questions is None:
                told["not_found"].append({"dataset": name, "split": split})
                log.warning("%s %s: no questions below %s", name, split, root)
                continue
            total.add(_convert_split(questions, folder, options, check, told))
    told["statistics"] = total.told()
    write_json(folder / REPORT, told)
    return told


def _convert_split(
    questions: Questions, folder: Path, options: Options, check: ImageCheck, told: dict[str, Any]
) -> Tally:
    records, tally = convert_questions(questions, options, check)
    name, split = questions.dataset.name, questions.split
    for passed in questions.passed_over:
        told["notes"].append(f"{passed} holds no answers; {questions.file} is taken instead")
    if records:
        target = folder / converted_file(name, split)
        write_records(target, records)
        result = {"dataset": name, "split": split, "samples": len(records), "output_file": str(target)}
        told["conversion_results"].append(
            result | {"skipped": dict(tally.skipped), "errors": tally.errors[:MAX_ERRORS]}
        )
    else:
        note = unpacking_hint(questions.folder) or "no question became a record"
        told["not_found"].append({"dataset": name, "split": split, "file": str(questions.file), "why": note})
        log.warning("%s %s: %s", name, split, note)
    skipped = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.most_common())
    log.info(
        "%s %s: %d of %d converted%s", name, split, len(records), tally.total_samples, f" ({skipped})" * bool(skipped)
    )
    return tally


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """A JSON list with a record on each line, whole or not at all."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    _write(path, f"[\n{lines}\n]\n")


def write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def output_folder(base: Path, given: str | Path | None) -> Path:
    """As given, else ``converted_data`` beside the data."""
    return Path(given) if given is not None else Path(os.path.normpath(base.parent)) / "converted_data"


def listing() -> str:
    """The catalog as a table: data set, name in recipes, category, tasks; the starter set is marked."""
    rows = [
        (f"{name}{' *' * told.is_starter}", registry_name(name), told.category, ", ".join(told.task_types))
        for name, told in FLARE_DATASETS.items()
    ]
    rows.insert(0, ("data set", "in recipes", "category", "tasks"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n* starter set"


def summary(told: dict[str, Any]) -> str:
    """What a person wants to know of a report, on a few lines."""
    counts = told["statistics"]
    lines = [
        f"converted {counts['converted_samples']:,} of {counts['total_samples']:,} questions, "
        f"{len(told['conversion_results'])} files"
    ]
    lines += [f"  left out: {count:,} {reason}" for reason, count in counts["skipped_by_reason"].items()]
    if counts["guessed_task_types"]:
        lines.append(f"  task unknown, the data set's first was taken: {counts['guessed_task_types']:,}")
    lines += [f"  {note}" for note in told["notes"]]
    missing = [f"{item['dataset']} {item['split']}" for item in told["not_found"]]
    return "\n".join([*lines, *([f"  nothing for: {', '.join(missing)}"] if missing else [])])


def parser(prog: str) -> argparse.ArgumentParser:
    told = argparse.ArgumentParser(prog=prog, description="Convert FLARE25 questions to training records.")
    told.add_argument("--datasets", nargs="+", default=["starter"], metavar="NAME", help="names, starter or all")
    told.add_argument("--all", action="store_true", help="every data set of the catalog")
    told.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="train, val, test")
    told.add_argument(
        "--input_dir", "--base_dir", metavar="DIR", help="the data (default: organized_dataset, here or one level up)"
    )
    told.add_argument("--output_dir", "--converted_dir", metavar="DIR", help="default: converted_data beside the input")
    told.add_argument("--coordinates", default="pixel", help=f"unit of boxes: {' or '.join(COORDINATES)}")
    told.add_argument("--check_images", default="decode", help=", ".join(CHECKS))
    told.add_argument("--keep_incomplete", action="store_true", help="keep questions of which some images are usable")
    told.add_argument("--num_workers", type=int, default=4, help="threads that check images")
    told.add_argument("--catalog", metavar="FILE", help="YAML of further data sets: name -> category, task_types")
    told.add_argument("--list", action="store_true", help="show the catalog and end")
    told.add_argument("--verbose", action="store_true", help="name every question that is left out")
    return told


def main(argv: list[str] | None = None, prog: str = "qwenvl-ft convert flare") -> int:
    """The command: exit code 0, 1 if a named data set gave no file, 2 for a user's error."""
    asked = parser(prog).parse_args(argv)
    try:
        return run(asked)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace) -> int:
    if asked.catalog:
        read_catalog(asked.catalog)
    if asked.list:
        print(listing())
        return 0
    names = find_datasets(["all"] if asked.all else asked.datasets)
    options = Options(
        coordinates=asked.coordinates,
        check_images=asked.check_images,
        keep_incomplete=asked.keep_incomplete,
        num_workers=asked.num_workers,
    )
    base = find_base(asked.input_dir)
    folder = output_folder(base, asked.output_dir)
    with logging_to(folder / LOG, verbose=asked.verbose):
        told = convert(names, asked.splits, base=base, output=folder, options=options)
    print(summary(told))
    print(f"report: {folder / REPORT}, log: {folder / LOG}")
    given = {result["dataset"] for result in told["conversion_results"]}
    without = [name for name in names if name not in given]
    if without:
        print(f"error: nothing was converted of {', '.join(without)}", file=sys.stderr)
    return 1 if without else 0


@contextmanager
def logging_to(file: Path, *, verbose: bool) -> Iterator[None]:
    """Everything into a file; results, and with ``verbose`` every question left out, onto the screen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    into_file, onto_screen = logging.FileHandler(file, mode="w", encoding="utf-8"), logging.StreamHandler(sys.stdout)
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


if __name__ == "__main__":
    sys.exit(main())
