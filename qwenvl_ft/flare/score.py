"""Scores answers to FLARE25's questions: the metrics of each data set, and their means by task.

    python -m qwenvl_ft.flare.score --predictions predictions --input_dir organized_dataset --split val

A file of predictions holds the question records with the model's text as ``prediction`` (or as ``Answer``, as in a
submission). They are joined with the references by image names and question. A missing prediction counts as an empty
answer.
"""

import argparse
import sys
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.metrics import METRICS, Metric, Scores
from qwenvl_ft.flare.catalog import (
    CLASSIFICATION,
    COUNTING,
    DETECTION,
    FLARE_DATASETS,
    INSTANCE_DETECTION,
    MULTI_LABEL,
    REGRESSION,
    REPORT,
    FlareDataset,
    find_task,
)
from qwenvl_ft.flare.command import add_data_options, run_command
from qwenvl_ft.flare.convert import write_json
from qwenvl_ft.flare.layout import answer_text, find_base, find_questions, read_questions

TASK_METRICS: dict[str, Metric] = {
    CLASSIFICATION: METRICS["classification"],
    MULTI_LABEL: METRICS["multi_label"],
    DETECTION: METRICS["detection"],
    INSTANCE_DETECTION: METRICS["instance_detection"],
    COUNTING: METRICS["counting"],
    REGRESSION: METRICS["regression"],
    REPORT: METRICS["report_generation"],
}
"""Task -> metric."""


@dataclass(frozen=True)
class Row:
    """One answered question."""

    dataset: str
    task: str
    reference: str
    answer: str


def score_rows(rows: Iterable[Row]) -> dict[str, Any]:
    """Score answered questions.

    Returns:
        ``datasets``: name -> ``metadata`` and ``metrics`` by task. ``tasks``: task -> the name of its ``primary``
        metric, the mean of every score over data sets, and the numbers of data sets and questions.

    Raises:
        DataError: a reference cannot be read; the message names data set and task.
    """
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.dataset][row.task].append(row)
    datasets: dict[str, Any] = {}
    for name, tasks in groups.items():
        metrics = {task: _score_task(name, task, group) for task, group in tasks.items()}
        datasets[name] = {"metadata": _metadata(name, tasks), "metrics": metrics}
    return {"datasets": datasets, "tasks": _by_task(datasets)}


def rows_of_records(records: Iterable[dict[str, Any]], answers: Iterable[str]) -> list[Row]:
    """Make rows of converted records and a model's answers to them, in the same order.

    Boxes of both must be in the same unit; the unit itself does not change the IoU.
    """
    return [
        Row(record["dataset"], record["task_type"], record["conversations"][-1]["value"], answer)
        for record, answer in zip(records, answers, strict=True)
    ]


def rows_of_questions(
    dataset: FlareDataset, references: Iterable[Any], predictions: Iterable[Any]
) -> tuple[list[Row], dict[str, int]]:
    """Make rows of question records with answers and records with predictions, joined by images and question.

    Returns:
        The rows, and counts: ``n_without_reference`` questions that have no answer to compare with, ``n_missing``
        questions without a prediction, ``n_extra`` predictions without a question.
    """
    given: dict[str, deque[str]] = defaultdict(deque)
    for record in predictions:
        if isinstance(record, dict):
            given[question_key(record)].append(
                answer_text(record, "prediction" if "prediction" in record else "Answer")
            )
    rows: list[Row] = []
    counts = {"n_without_reference": 0, "n_missing": 0, "n_extra": 0}
    for record in references:
        if not isinstance(record, dict):
            continue
        reference, key = answer_text(record), question_key(record)
        answered = bool(given[key])
        answer = given[key].popleft() if answered else ""
        if not reference:
            counts["n_without_reference"] += 1
            continue
        counts["n_missing"] += not answered
        task, _ = find_task(record["TaskType"] if "TaskType" in record else None, dataset)
        rows.append(Row(dataset.name, task, reference, answer))
    counts["n_extra"] = sum(map(len, given.values()))
    return rows, counts


def question_key(record: dict[str, Any]) -> str:
    """Return the key that records of the same question share: ``ImageName||Question``."""
    image = record["ImageName"] if "ImageName" in record else None
    return f"{image}||{str(record['Question'] if 'Question' in record else '').strip()}"


def dataset_of_file(path: Path) -> FlareDataset:
    """Return the data set that a file is named after, e.g. ``BUSI-det_questions_val.json``.

    Raises:
        DataError: the name begins with no known data set.
    """
    fitting = [name for name in FLARE_DATASETS if path.name.lower().startswith(f"{name.lower()}_")]
    if not fitting:
        raise DataError(f"{path}: its name begins with no FLARE data set. Example: retino_questions_val.json.")
    return FLARE_DATASETS[max(fitting, key=len)]


def score_files(files: Iterable[Path], base: str | Path | None = None, split: str = "val") -> dict[str, Any]:
    """Score files of predictions.

    Args:
        base: ``organized_dataset`` with the references; None uses ``Answer`` in the same files, beside ``prediction``.

    Raises:
        DataError: a file cannot be read, its references are missing, or there is nothing to compare.
    """
    rows: list[Row] = []
    counts: dict[str, dict[str, int]] = {}
    for path in files:
        dataset, predictions = dataset_of_file(path), read_questions(path)
        references = _references(dataset, base, split, path, predictions)
        found, counts[dataset.name] = rows_of_questions(dataset, references, predictions)
        rows += found
    if not rows:
        raise DataError("there is nothing to score: no question has both a prediction and an answer.")
    summary = score_rows(rows)
    for name, item in summary["datasets"].items():
        item["metadata"] |= counts[name]
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return a table of the primary metric per data set and task, and the means."""
    rows = [("data set", "task", "metric", "score", "questions", "unparsed")]
    for name, item in summary["datasets"].items():
        for task, metrics in item["metrics"].items():
            rows.append((name, task, *_cells(TASK_METRICS[task].primary, metrics), str(metrics["n_unparsed"])))
    for task, metrics in summary["tasks"].items():
        rows.append(("mean", task, *_cells(metrics["primary"], metrics), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parser(prog: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=prog, description="Score answers to FLARE25 questions.")
    options.add_argument("--predictions", nargs="+", required=True, metavar="PATH", help="files, or folders of them")
    add_data_options(
        options, input_help="the data with answers (default: the answers in the predictions)", datasets=False
    )
    options.add_argument("--split", default="val", help="split of the answers (default: val)")
    options.add_argument("--output", metavar="FILE", help="write the summary to this JSON file")
    return options


def run(arguments: argparse.Namespace) -> int:
    base = find_base(arguments.input_dir) if arguments.input_dir else None
    summary = score_files(_files(arguments.predictions), base, arguments.split)
    print(table(summary))
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(arguments.output), summary)
        print(f"summary: {arguments.output}")
    return 0


def _references(
    dataset: FlareDataset, base: str | Path | None, split: str, path: Path, predictions: list[Any]
) -> list[Any]:
    if base is not None:
        questions = find_questions(base, dataset, split)
        if questions is None:
            raise DataError(f"{path}: there are no {split} questions of {dataset.name} below {base}.")
        return questions.records
    if not any(isinstance(record, dict) and "prediction" in record for record in predictions):
        raise DataError(f"{path}: no record has a 'prediction' beside its 'Answer'. Give the answers with --input_dir.")
    return predictions


def _score_task(name: str, task: str, rows: list[Row]) -> Scores:
    try:
        return TASK_METRICS[task].score([row.reference for row in rows], [row.answer for row in rows])
    except DataError as error:
        raise DataError(f"{name}, {task}: {error}") from None


def _metadata(name: str, tasks: dict[str, list[Row]]) -> dict[str, Any]:
    known = FLARE_DATASETS[name] if name in FLARE_DATASETS else None
    return {
        "category": known.category if known else None,
        "modality": known.modality if known else None,
        "tasks": {task: len(rows) for task, rows in tasks.items()},
        "samples": sum(map(len, tasks.values())),
    }


def _by_task(datasets: dict[str, Any]) -> dict[str, Any]:
    """Average over data sets, all with the same weight."""
    tasks: dict[str, Any] = {}
    for task, metric in TASK_METRICS.items():
        results = [item["metrics"][task] for item in datasets.values() if task in item["metrics"]]
        if not results:
            continue
        sums = {"count", "n_unparsed"}
        numbers = [key for key, value in results[0].items() if isinstance(value, (int, float)) and key not in sums]
        means = {key: _mean([result[key] for result in results if result[key] is not None]) for key in numbers}
        tasks[task] = {"primary": metric.primary, "higher_is_better": metric.higher_is_better, "datasets": len(results)}
        tasks[task] |= means | {key: sum(result[key] for result in results) for key in sorted(sums)}
    return tasks


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _cells(primary: str, metrics: Scores) -> tuple[str, str, str]:
    return primary, f"{metrics[primary]:.4f}", str(metrics["count"])


def _files(paths: Iterable[str]) -> list[Path]:
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise DataError(f"there is no .json file in {', '.join(paths)}.")
    return files


def main(argv: list[str] | None = None, prog: str = "python -m qwenvl_ft.flare.score") -> int:
    """Run the command: exit code 0, 2 for a user's error."""
    return run_command(run, parser(prog).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
