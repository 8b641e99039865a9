"""Answers FLARE25's questions with a model and writes files that can be scored or submitted.

    python -m qwenvl_ft.flare.predict --model output/qwen3vl_flare25_starter --datasets starter --output_dir predictions

Each file holds the question records with the model's text as ``prediction``. Boxes are written in pixels of the stored
image, as the challenge requires, even if the model was trained on thousandths (``--coordinates norm1000``).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.data.media.reading import SIZE_ONLY, reading_of, saved_reading
from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.parse import parse_instances
from qwenvl_ft.flare.catalog import BOX_TASKS, FLARE_DATASETS, FlareDataset, find_datasets, find_task
from qwenvl_ft.flare.command import add_data_options, add_image_limit, add_reading_options, run_command
from qwenvl_ft.flare.convert import write_json
from qwenvl_ft.flare.image_check import ImageCheck
from qwenvl_ft.flare.layout import Questions, find_base, find_questions
from qwenvl_ft.flare.question_record import COORDINATES, LeftOut, Options, Tally, find_images, question_text

Answerer = Callable[[Sequence[dict[str, Any]]], list[str]]
"""Function from prompts (records without an answer) to a text for each."""


def predict(
    questions: Questions,
    answer: Answerer,
    *,
    coordinates: str = "pixel",
    policy: MediaPolicy | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Return the question records with ``prediction``, and the number of questions that could not be asked.

    A question with unusable images gets an empty prediction; no question is dropped.

    Args:
        policy: how images are opened, see `model_answerer`.
    """
    check = ImageCheck("header", policy or MediaPolicy())
    records = [dict(record) if isinstance(record, dict) else {} for record in questions.records]
    prompts: dict[int, dict[str, Any]] = {}
    faults: dict[str, str] = {}
    for index, record in enumerate(records):
        prompt = make_prompt(record, questions, check, faults)
        if prompt is not None:
            prompts[index] = prompt
    for message in faults.values():
        print(f"{questions.dataset.name}: not asked, e.g.: {message}", file=sys.stderr)
    answers = dict(zip(prompts, answer(list(prompts.values())), strict=True)) if prompts else {}
    for index, record in enumerate(records):
        text = answers[index] if index in answers else ""
        if coordinates == "norm1000" and text and _has_boxes(record, questions.dataset):
            text = in_pixels(text, prompts[index]["image"][0], check.encoder.policy)
        record["prediction"] = text
    return records, len(records) - len(answers)


def make_prompt(
    record: dict[str, Any], questions: Questions, check: ImageCheck, faults: dict[str, str]
) -> dict[str, Any] | None:
    """Return the question as a training record without answer; None if it has no text or an unusable image.

    Args:
        faults: gets the first message of each reason why images are unusable.
    """
    text = question_text(record)
    try:
        images = find_images(record, questions.folder, Options(), check, Tally())
    except LeftOut as error:
        faults.setdefault(error.reason, str(error))
        return None
    tags = "<image>\n" * len(images)
    turns = [{"from": "human", "value": tags + text}]
    return {"image": [str(path) for path in images], "conversations": turns} if text else None


def in_pixels(text: str, image: str, policy: MediaPolicy | None = None) -> str:
    """Convert boxes in thousandths to pixels of an image, as JSON; a text without boxes is unchanged."""
    found = parse_instances(text)
    if not found:
        return text
    height, width = image_size(image, policy or MediaPolicy(reading=SIZE_ONLY))
    sides = (width, height, width, height)
    boxes = {
        name: [[round(value * side / 1000, 2) for value, side in zip(box, sides, strict=True)] for box in boxes]
        for name, boxes in found.items()
    }
    return json.dumps(boxes[""] if set(boxes) == {""} else boxes, ensure_ascii=False)


def model_answerer(
    model: str, adapter: Path | None, *, torch_dtype: str, attn_impl: str, policy: MediaPolicy, **options: Any
) -> tuple[Answerer, MediaPolicy]:
    """Load a model, optionally with an adapter; ``options`` go to `generate`.

    Args:
        policy: limits on opening images; what its reading leaves open is as the model was trained.

    Returns:
        The answerer, and the policy by which it opens images.
    """
    from transformers.utils import logging

    from qwenvl_ft.cli.infer import load
    from qwenvl_ft.data.encode.encoder import Encoder
    from qwenvl_ft.evaluation.generate import generate

    logging.disable_progress_bar()
    adapters = [] if adapter is None else [adapter]
    loaded, [(_, processor)] = load(model, adapters, torch_dtype=torch_dtype, attn_impl=attn_impl)
    policy = replace(policy, reading=policy.reading.over(saved_reading(processor)))
    encoder = Encoder(processor, policy=policy)
    return lambda prompts: generate(
        loaded, processor, prompts, encoder=encoder, progress=show_progress, **options
    ), policy


def show_progress(done: int, batches: int) -> None:
    """Print a progress line if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {batches} batches", end="" if done < batches else "\n", file=sys.stderr, flush=True)


def find_all(names: Iterable[str], split: str, base: Path) -> list[Questions]:
    """Return the questions of each data set that has any.

    Raises:
        DataError: no data set has any.
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


def predict_all(questions_by_set: Iterable[Questions], output: Path, answer: Answerer, **options: Any) -> None:
    """Write one file of predictions per data set; ``options`` go to `predict`."""
    output.mkdir(parents=True, exist_ok=True)
    for questions in questions_by_set:
        records, not_asked = predict(questions, answer, **options)
        target = output / f"{questions.dataset.name}_questions_{questions.split}.json"
        write_json(target, records)
        print(f"{questions.dataset.name}: {len(records):,} questions, {not_asked:,} not asked, {target}")


def parser(prog: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=prog, description="Answer FLARE25 questions with a model.")
    options.add_argument("--model", required=True, metavar="DIR", help="directory or hub id of a model or adapter")
    options.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to put on the model")
    add_data_options(options, input_help="the data (default: organized_dataset, here or one level up)")
    options.add_argument("--split", default="val", help="train, val or test (default: val)")
    options.add_argument("--output_dir", type=Path, default=Path("predictions"), metavar="DIR")
    options.add_argument("--coordinates", default="pixel", choices=COORDINATES, help="unit of boxes in training")
    add_image_limit(options)
    options.add_argument("--batch_size", type=int, default=8, help="questions per batch")
    options.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")
    options.add_argument("--torch_dtype", default="auto", help="bfloat16, float16, float32, or auto: as it was saved")
    options.add_argument("--attn_impl", default="auto", help="as model.attn_impl in a recipe")
    add_reading_options(options, default="as the model was trained")
    return options


def run(arguments: argparse.Namespace) -> int:
    questions = find_all(find_datasets(arguments.datasets), arguments.split, find_base(arguments.input_dir))
    answer, policy = model_answerer(
        arguments.model,
        arguments.adapter,
        torch_dtype=arguments.torch_dtype,
        attn_impl=arguments.attn_impl,
        policy=MediaPolicy(max_image_pixels=arguments.max_image_pixels, reading=reading_of(vars(arguments), "--")),
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    predict_all(questions, arguments.output_dir, answer, coordinates=arguments.coordinates, policy=policy)
    return 0


def _has_boxes(record: dict[str, Any], dataset: FlareDataset) -> bool:
    return find_task(record["TaskType"] if "TaskType" in record else None, dataset)[0] in BOX_TASKS


def main(argv: list[str] | None = None, prog: str = "python -m qwenvl_ft.flare.predict") -> int:
    """Run the command: exit code 0, 2 for a user's error."""
    return run_command(run, parser(prog).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
