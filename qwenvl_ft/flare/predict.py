"""A model's answers to FLARE25's questions, as files that can be scored or handed in.

    python -m qwenvl_ft.flare.predict --model output/qwen3vl_flare25_starter --datasets starter --output_dir predictions

Each file holds the question records, with the model's text as ``prediction``. Boxes are written in pixels of the stored
image, as the challenge wants them, also if the model was trained on thousandths (``--coordinates norm1000``).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.evaluation.parse import parse_instances
from qwenvl_ft.flare.catalog import BOX_TASKS, FLARE_DATASETS, FlareDataset, find_datasets, find_task, read_catalog
from qwenvl_ft.flare.convert import write_json
from qwenvl_ft.flare.layout import Questions, find_base, find_questions
from qwenvl_ft.flare.records import COORDINATES, ImageCheck, LeftOut, Options, Tally, find_images, question_text

Answerer = Callable[[Sequence[dict[str, Any]]], list[str]]
"""Prompts as records without an answer -> a text for each."""


def predict(questions: Questions, answer: Answerer, *, coordinates: str = "pixel") -> tuple[list[dict[str, Any]], int]:
    """The question records with ``prediction``, and how many could not be asked.

    A question whose images cannot be used is answered with nothing; nothing is left out, so that the file fits its
    questions.
    """
    check = ImageCheck("header")
    told = [dict(record) if isinstance(record, dict) else {} for record in questions.records]
    prompts: dict[int, dict[str, Any]] = {}
    for index, record in enumerate(told):
        prompt = make_prompt(record, questions, check)
        if prompt is not None:
            prompts[index] = prompt
    answers = dict(zip(prompts, answer(list(prompts.values())), strict=True)) if prompts else {}
    for index, record in enumerate(told):
        text = answers[index] if index in answers else ""
        if coordinates == "norm1000" and text and _has_boxes(record, questions.dataset):
            text = in_pixels(text, prompts[index]["image"][0])
        record["prediction"] = text
    return told, len(told) - len(answers)


def make_prompt(record: dict[str, Any], questions: Questions, check: ImageCheck) -> dict[str, Any] | None:
    """The question as a training record without its answer; None if it has no text or an image cannot be used."""
    text = question_text(record)
    try:
        images = find_images(record, questions.folder, Options(), check, Tally())
    except LeftOut:
        return None
    tags = "<image>\n" * len(images)
    turns = [{"from": "human", "value": tags + text}]
    return {"image": [str(path) for path in images], "conversations": turns} if text else None


def in_pixels(text: str, image: str) -> str:
    """Boxes in thousandths -> the same in pixels of an image, as JSON; a text without boxes stays as it is."""
    found = parse_instances(text)
    if not found:
        return text
    height, width = image_size(image, MediaPolicy())
    sides = (width, height, width, height)
    boxes = {
        name: [[round(value * side / 1000, 2) for value, side in zip(box, sides, strict=True)] for box in boxes]
        for name, boxes in found.items()
    }
    return json.dumps(boxes[""] if set(boxes) == {""} else boxes, ensure_ascii=False)


def model_answerer(model: str, adapter: Path | None, *, torch_dtype: str, attn_impl: str, **options: Any) -> Answerer:
    """Answers of a model, or of an adapter on one; ``options`` are those of `generate`."""
    from transformers.utils import logging

    from qwenvl_ft.cli.infer import load
    from qwenvl_ft.evaluation.generate import generate

    logging.disable_progress_bar()
    adapters = [] if adapter is None else [adapter]
    loaded, [(_, processor)] = load(model, adapters, torch_dtype=torch_dtype, attn_impl=attn_impl)
    return lambda prompts: generate(loaded, processor, prompts, progress=show_progress, **options)


def show_progress(done: int, batches: int) -> None:
    """A line that counts, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {batches} batches", end="" if done < batches else "\n", file=sys.stderr, flush=True)


def find_all(names: Iterable[str], split: str, base: Path) -> list[Questions]:
    """The questions of each data set that has some.

    Raises:
        DataError: none has.
    """
    found: list[Questions] = []
    for name in names:
        questions = find_questions(base, FLARE_DATASETS[name], split, answered=False)
        if questions is None:
            print(f"{name}: no {split} questions below {base}")
        else:
            found.append(questions)
    if not found:
        raise DataError(f"there are no {split} questions below {base}.")
    return found


def predict_all(asked: Iterable[Questions], output: Path, answer: Answerer, *, coordinates: str = "pixel") -> None:
    """Write a file of predictions for each data set."""
    output.mkdir(parents=True, exist_ok=True)
    for questions in asked:
        told, not_asked = predict(questions, answer, coordinates=coordinates)
        target = output / f"{questions.dataset.name}_questions_{questions.split}.json"
        write_json(target, told)
        print(f"{questions.dataset.name}: {len(told):,} questions, {not_asked:,} not asked, {target}")


def parser(prog: str) -> argparse.ArgumentParser:
    told = argparse.ArgumentParser(prog=prog, description="Answer FLARE25 questions with a model.")
    told.add_argument("--model", required=True, metavar="DIR", help="directory or hub id of a model or adapter")
    told.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to put on the model")
    told.add_argument("--datasets", nargs="+", default=["starter"], metavar="NAME", help="names, starter or all")
    told.add_argument("--split", default="val", help="train, val or test (default: val)")
    told.add_argument("--input_dir", "--base_dir", metavar="DIR", help="the data (default: organized_dataset)")
    told.add_argument("--output_dir", type=Path, default=Path("predictions"), metavar="DIR")
    told.add_argument("--coordinates", default="pixel", choices=COORDINATES, help="unit of boxes in training")
    told.add_argument("--batch_size", type=int, default=8, help="questions that are answered together")
    told.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")
    told.add_argument("--torch_dtype", default="auto", help="bfloat16, float16, float32, or auto: as it was saved")
    told.add_argument("--attn_impl", default="auto", help="as model.attn_impl in a recipe")
    told.add_argument("--catalog", metavar="FILE", help="YAML of further data sets")
    return told


def main(argv: list[str] | None = None, prog: str = "python -m qwenvl_ft.flare.predict") -> int:
    """The command: exit code 0, 2 for a user's error."""
    asked = parser(prog).parse_args(argv)
    try:
        if asked.catalog:
            read_catalog(asked.catalog)
        questions = find_all(find_datasets(asked.datasets), asked.split, find_base(asked.input_dir))
        answer = model_answerer(
            asked.model,
            asked.adapter,
            torch_dtype=asked.torch_dtype,
            attn_impl=asked.attn_impl,
            batch_size=asked.batch_size,
            max_new_tokens=asked.max_new_tokens,
        )
        predict_all(questions, asked.output_dir, answer, coordinates=asked.coordinates)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _has_boxes(record: dict[str, Any], dataset: FlareDataset) -> bool:
    return find_task(record["TaskType"] if "TaskType" in record else None, dataset)[0] in BOX_TASKS


if __name__ == "__main__":
    sys.exit(main())
