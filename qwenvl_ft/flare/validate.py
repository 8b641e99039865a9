"""Checks converted files before training: structure, tags against images, every image decoded, answers, duplicates.

    qwenvl-ft convert flare-validate --input_dir converted_data
    qwenvl-ft convert flare-validate --files converted_data/retino_train.json

Exit code 0 without errors, 1 otherwise; warnings do not count. ``validation_report.json`` lists all findings.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.errors import DataError, one_line
from qwenvl_ft.flare.command import add_image_limit, run_command
from qwenvl_ft.flare.conversion_report import REPORT as CONVERSION_REPORT
from qwenvl_ft.flare.convert import write_json
from qwenvl_ft.flare.image_check import CHECKS, ImageCheck, image_value
from qwenvl_ft.flare.layout import answer_text

REPORT = "validation_report.json"
FOLDERS = ("converted_data", "../converted_data")
"""Folders that are tried if none is given."""
TURNS = ("human", "gpt")
MAX_SHOWN = 5
"""Most findings printed per file; the report lists all."""


@dataclass
class Findings:
    """Errors and warnings of one file."""

    file: str
    samples: int = 0
    images: int = 0
    errors: list[dict[str, str]] = field(default_factory=list)
    """``record`` (``file.json[3]``), ``kind`` and ``message`` of each; likewise the warnings."""
    warnings: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the findings as a dict for the report."""
        kinds = Counter(finding["kind"] for finding in self.errors + self.warnings)
        return {
            "file": self.file,
            "valid": not self.errors,
            "samples": self.samples,
            "images": self.images,
            "by_kind": dict(kinds.most_common()),
            "errors": self.errors,
            "warnings": self.warnings,
        }


def validate_file(path: str | Path, check: ImageCheck | None = None, num_workers: int = 4) -> Findings:
    """Find all errors and warnings of a converted file.

    Args:
        check: shared between files, so that each image is decoded once.
    """
    from qwenvl_ft.data.conversation import Source

    check = check or ImageCheck("decode")
    findings = Findings(str(path))
    records, fault = _read(Path(path))
    if fault:
        findings.errors.append({"record": str(path), "kind": "json", "message": fault})
        return findings
    findings.samples = len(records)
    named = [Path(path).parent / name for record in records for name in _images(record)]
    findings.images = len(set(named))
    values = [image_value(Path(path).parent / name, record) for record in records for name in _images(record)]
    check.look([value for value, image in zip(values, named, strict=True) if image.is_file()], num_workers)
    seen: dict[str, int] = {}
    for index, record in enumerate(records):
        where = f"{path}[{index}]"
        errors = list(record_errors(record, Path(path).parent, check))
        if not errors and (refused := check.refusal(record, Source(str(path), where), Path(path).parent)):
            errors = [("encoding", refused)]
        findings.errors += [{"record": where, "kind": kind, "message": message} for kind, message in errors]
        for kind, message in record_warnings(record, index, seen):
            findings.warnings.append({"record": where, "kind": kind, "message": message})
    return findings


def record_errors(record: Any, folder: Path, check: ImageCheck) -> Iterator[tuple[str, str]]:
    """Yield (kind, message) for each reason why a record cannot be trained on.

    Args:
        folder: folder to which image paths are relative.
    """
    if not isinstance(record, dict):
        yield "structure", f"a record is an object, this is a {type(record).__name__}"
        return
    images = _images(record)
    if not images:
        yield "image", "image is not a path or a list of paths"
    for name in images:
        if not (folder / name).is_file():
            yield "missing_image", f"{name} does not exist"
        elif (looked := check.fault(image_value(folder / name, record))).kind:
            yield looked.kind, looked.message
    turns = record["conversations"] if "conversations" in record else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        yield "structure", "conversations is not a list of turns"
        return
    speakers = tuple(turn["from"] if "from" in turn else None for turn in turns)
    if speakers != TURNS:
        yield "turns", f"turns are {', '.join(map(str, speakers)) or '(none)'}, not {' and '.join(TURNS)}"
        return
    question, answer = (turn["value"] if "value" in turn else None for turn in turns)
    if not isinstance(question, str) or not isinstance(answer, str):
        yield "structure", "the value of a turn is not a text"
        return
    from qwenvl_ft.data.readers.media_pool import TAGS

    tags = TAGS.findall(question)
    if tags != ["<image>"] * len(images):
        yield "tags", f"{len(tags)} <image> tags, {len(images)} images"
    if found := TAGS.findall(answer):
        yield "tags", f"the answer holds an {found[0]} tag"
    yield from _unread_errors(record)


def _unread_errors(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key that changes what a record means and that training does not read."""
    from qwenvl_ft.data.conversation import Source
    from qwenvl_ft.data.readers.unread_turns import unread_of_record

    try:
        unread_of_record(record, "conversations", Source("", ""))
    except DataError as error:
        yield "meaning", str(error).removeprefix(": ")


def record_warnings(record: Any, index: int, seen: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (kind, message) for what is valid but probably unintended.

    Args:
        seen: key of a record -> its index, filled here. The key includes the images: the same question about another
            image is another record.
    """
    if not isinstance(record, dict) or "conversations" not in record:
        return
    turns = record["conversations"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    if isinstance(last, dict) and not answer_text(last, "value"):
        yield "empty_answer", "the answer is empty"
    key = json.dumps([_images(record), turns], sort_keys=True)
    if key in seen:
        yield "duplicate", f"the same as record {seen[key]}"
    seen.setdefault(key, index)


def validate(
    files: Iterable[Path],
    check_images: str = "decode",
    num_workers: int = 4,
    max_image_pixels: int = MediaPolicy.max_image_pixels,
) -> dict[str, Any]:
    """Return the report on several files: ``files`` and a ``summary``."""
    check = ImageCheck(check_images, MediaPolicy(max_image_pixels=max_image_pixels))
    results = [validate_file(path, check, num_workers) for path in files]
    kinds: Counter[str] = Counter()
    for result in results:
        kinds.update(finding["kind"] for finding in result.errors + result.warnings)
    return {
        "summary": {
            "valid": not any(result.errors for result in results),
            "files": len(results),
            "samples": sum(result.samples for result in results),
            "errors": sum(len(result.errors) for result in results),
            "warnings": sum(len(result.warnings) for result in results),
            "by_kind": dict(kinds.most_common()),
        },
        "files": [result.to_json() for result in results],
    }


def find_files(folder: str | Path | None, names: Iterable[str] | None) -> list[Path]:
    """Return the converted files of a folder, or the named files, which may be relative to the folder.

    Raises:
        DataError: a named file is missing, or there is no folder or file.
    """
    folders = FOLDERS if folder is None else (folder,)
    root = next((Path(place) for place in folders if Path(place).is_dir()), None)
    if names is not None:
        paths = [Path(name) if root is None or Path(name).exists() else root / name for name in names]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"there is no file {', '.join(missing)}. Correct --files.")
        return paths
    if root is None:
        raise DataError(f"there is no folder {' or '.join(map(str, folders))}. Give converted data with --input_dir.")
    found = sorted(path for path in root.glob("*.json") if path.name not in (REPORT, CONVERSION_REPORT))
    if not found:
        raise DataError(f"{root} has no converted files. Run: qwenvl-ft convert flare --output_dir {root}")
    return found


def parser(prog: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=prog, description="Check converted FLARE25 files before training.")
    options.add_argument(
        "--input_dir",
        "--converted_dir",
        metavar="DIR",
        help="the files (default: converted_data, here or one level up)",
    )
    options.add_argument("--files", nargs="+", metavar="FILE", help="check only these files")
    options.add_argument("--check_images", default="decode", choices=CHECKS, help="how thoroughly images are checked")
    add_image_limit(options)
    options.add_argument("--num_workers", type=int, default=4, help="threads that check images")
    options.add_argument("--save_report", metavar="FILE", help=f"default: {REPORT} beside the files")
    return options


def run(arguments: argparse.Namespace) -> int:
    files = find_files(arguments.input_dir, arguments.files)
    report = validate(files, arguments.check_images, arguments.num_workers, arguments.max_image_pixels)
    target = Path(arguments.save_report) if arguments.save_report else files[0].parent / REPORT
    write_json(target, report)
    for result in report["files"]:
        print(f"{'ok    ' if result['valid'] else 'FAILED'} {result['file']}: {result['samples']:,} samples")
        for finding in (result["errors"] + result["warnings"])[:MAX_SHOWN]:
            print(f"       {finding['kind']}: {finding['record']}: {finding['message']}")
    counts = report["summary"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts["by_kind"].items())
    print(
        f"{counts['samples']:,} samples, {counts['errors']:,} errors, {counts['warnings']:,} warnings"
        + f": {kinds}" * bool(kinds)
    )
    print(f"report: {target}")
    return 0 if counts["valid"] else 1


def _read(path: Path) -> tuple[list[Any], str]:
    """Return the records, and the fault of the file as a whole."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return [], f"not valid JSON: {one_line(error)}"
    if not isinstance(records, list):
        return [], f"a file of records is a JSON list, this is a {type(records).__name__}"
    return (records, "") if records else ([], "the list is empty")


def _images(record: Any) -> list[str]:
    """Return a record's image paths (a path or a list of paths); empty if they are anything else."""
    value = record["image"] if isinstance(record, dict) and "image" in record else None
    names = value if isinstance(value, list) else [value]
    kept = [name for name in names if isinstance(name, str) and name]
    return kept if len(kept) == len(names) else []


def main(argv: list[str] | None = None, prog: str = "qwenvl-ft convert flare-validate") -> int:
    """Run the command: exit code 0, 1 if a file has an error, 2 for a user's error."""
    return run_command(run, parser(prog).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
