"""Converts a FLARE25 question to a training record in the conversations format, or gives the reason to skip it."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.data.media.reading import REFUSING, Reading
from qwenvl_ft.errors import DataError, hint
from qwenvl_ft.evaluation.parse import BOX, Box, map_boxes
from qwenvl_ft.flare.catalog import BOX_TASKS, find_task
from qwenvl_ft.flare.image_check import CHECKS, ImageCheck
from qwenvl_ft.flare.layout import Questions, answer_text, find_image, image_names

COORDINATES = ("pixel", "norm1000")
"""Units of boxes in answers: pixels of the stored image, or thousandths of its width and height, as in Qwen3-VL."""
log = logging.getLogger("qwenvl_ft.flare")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the conversion."""

    coordinates: str = "pixel"
    check_images: str = "decode"
    """``decode`` the whole image, read the ``header``, or only check that the file exists (``none``)."""
    keep_incomplete: bool = False
    """Keep a question with its usable images if others are missing or damaged."""
    num_workers: int = 4
    """Threads that check images."""
    max_image_pixels: int = MediaPolicy.max_image_pixels
    """Largest stored image, in pixels."""
    reading: Reading = REFUSING
    """How images deeper than 8 bits are converted; the records of those images get it as their own keys."""

    def __post_init__(self) -> None:
        for value, known, flag in (
            (self.coordinates, COORDINATES, "--coordinates"),
            (self.check_images, CHECKS, "--check_images"),
        ):
            if value not in known:
                raise DataError(f"{flag} {value}: unknown.{hint(value, known)}")
        if self.num_workers < 1:
            raise DataError(f"--num_workers {self.num_workers}: give 1 or more.")


class LeftOut(DataError):
    """Raised for a question that is skipped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Tally:
    """Counts of converted and skipped questions, of one or several splits."""

    total_samples: int = 0
    converted_samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of skipped questions."""
    faulty_images: Counter[str] = field(default_factory=Counter)
    """Reason -> number of images that questions name and that cannot be used."""
    found_by_name: int = 0
    """Images named without a folder and found in an image folder."""
    task_types: Counter[str] = field(default_factory=Counter)
    image_counts: Counter[str] = field(default_factory=Counter)
    conversions: Counter[str] = field(default_factory=Counter)
    """How values become 8 bits -> number of images deeper than that, in the converted questions."""
    guessed_tasks: int = 0
    """Questions with an unknown task name, for which the data set's first task was used."""
    errors: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as they stand in the report."""
        return {
            "total_samples": self.total_samples,
            "converted_samples": self.converted_samples,
            "skipped_samples": self.skipped.total(),
            "skipped_by_reason": dict(self.skipped.most_common()),
            "missing_images": self.faulty_images["missing_image"],
            "corrupted_images": self.faulty_images["corrupted_image"],
            "ambiguous_images": self.faulty_images["ambiguous_image"],
            "images_found_by_name": self.found_by_name,
            "too_large_images": self.faulty_images["too_large_image"],
            "too_thin_images": self.faulty_images["too_thin_image"],
            "task_type_distribution": dict(self.task_types.most_common()),
            "image_count_distribution": dict(sorted(self.image_counts.items())),
            "high_bit_depth_images": dict(self.conversions),
            "guessed_task_types": self.guessed_tasks,
            "total_errors": len(self.errors),
        }


def convert_questions(questions: Questions, options: Options, check: ImageCheck) -> tuple[list[dict[str, Any]], Tally]:
    """Convert a split; return its records and the counts."""
    tally = Tally(total_samples=len(questions.records))
    named = [name for question in questions.records if isinstance(question, dict) for name in image_names(question)]
    found = [find_image(questions.folder, name) for name in dict.fromkeys(named)]
    check.look([path for paths in found for path in paths if len(paths) == 1], options.num_workers)
    records: list[dict[str, Any]] = []
    for index, question in enumerate(questions.records):
        try:
            record = make_record(question, questions, index, options, check, tally)
        except LeftOut as error:
            tally.skipped[error.reason] += 1
            tally.errors.append(f"{questions.file}[{index}]: {error}")
            log.debug("skipped %s[%d]: %s", questions.file, index, error)
            continue
        tally.task_types[record["task_type"]] += 1
        tally.image_counts[str(len(record["image"]))] += 1
        records.append(record)
    tally.converted_samples = len(records)
    return records, tally


def make_record(
    question: Any, questions: Questions, index: int, options: Options, check: ImageCheck, tally: Tally
) -> dict[str, Any]:
    """Convert a question to a record; scoring needs the keys that training ignores.

    Raises:
        LeftOut: the question has no image, text or answer, an image is unusable, or the encoder refuses the record.
    """
    if not isinstance(question, dict):
        raise LeftOut("malformed", f"a question is an object, this is a {type(question).__name__}")
    text = question_text(question)
    answer = answer_text(question)
    if not text:
        raise LeftOut("empty_question", "it has no question")
    if not answer:
        raise LeftOut("empty_answer", "it has no answer")
    refuse_control_tokens(text, answer)
    images = find_images(question, questions.folder, options, check, tally)
    dataset = questions.dataset
    task, certain = find_task(question["TaskType"] if "TaskType" in question else None, dataset)
    tally.guessed_tasks += not certain
    record: dict[str, Any] = {
        "id": f"{dataset.name}_{questions.split}_{index:06d}",
        "image": [str(path) for path in images],
        "conversations": [
            {"from": "human", "value": "<image>\n" * len(images) + text},
            {"from": "gpt", "value": answer},
        ],
        "dataset": dataset.name,
        "task_type": task,
        "modality": dataset.modality,
        "image_name": question["ImageName"],
    }
    if deep := sum(check.is_deep(path) for path in images):
        tally.conversions[str(options.reading)] += deep
        record |= options.reading.keys()
    if task in BOX_TASKS and options.coordinates == "norm1000":
        width, height = common_size(images, check.encoder.policy)
        record["conversations"][1]["value"] = normalised(answer, width, height)
        record |= {"coordinates": "norm1000", "width": width, "height": height}
    from qwenvl_ft.data.conversation import Source

    if message := check.refusal(record, Source(dataset.name, f"{questions.file}[{index}]"), questions.folder):
        raise LeftOut("encoding", message)
    return record


def question_text(question: dict[str, Any]) -> str:
    """Return the question without its own image tags, which the conversion writes anew."""
    return answer_text(question, "Question").replace("<image>", "").replace("<video>", "").strip()


def find_images(
    question: dict[str, Any], folder: Path, options: Options, check: ImageCheck, tally: Tally
) -> list[Path]:
    """Return the image files of a question, all checked.

    Raises:
        LeftOut: it names no image, or one is missing or unusable; with ``keep_incomplete`` only if none is left.
    """
    names = image_names(question)
    if not names:
        raise LeftOut("no_image", f"it names no image: {question.get('ImageName')!r:.80}")
    kept: list[Path] = []
    faults: list[tuple[str, str]] = []
    for name in names:
        paths = find_image(folder, name)
        if not paths:
            faults.append(("missing_image", f"image {name} is not below {folder}"))
        elif len(paths) > 1:
            places = " and ".join(path.parent.name for path in paths)
            faults.append(("ambiguous_image", f"image {name} is in {places} of {folder}. Name its folder."))
        elif (looked := check.fault(paths[0])).kind:
            faults.append((looked.kind, looked.message))
        else:
            kept.append(paths[0])
            if paths[0] != folder / name.replace("\\", "/"):
                tally.found_by_name += 1
                log.debug("%s is not in %s; %s is used", name, folder, paths[0])
    tally.faulty_images.update(reason for reason, _ in faults)
    if faults and not (kept and options.keep_incomplete):
        raise LeftOut(*faults[0])
    for _, fault in faults:
        log.warning("%s: kept with %d of %d images", fault, len(kept), len(names))
    return kept


def refuse_control_tokens(question: str, answer: str) -> None:
    """Raise LeftOut for text with control tokens or media tags, which the encoder would refuse."""
    from qwenvl_ft.data.encode.draft import CONTROL
    from qwenvl_ft.data.readers.media_pool import TAGS

    tokens = (
        TAGS.findall(question)
        + TAGS.findall(answer)
        + [token for token in CONTROL if token in question or token in answer]
    )
    if tokens:
        raise LeftOut("control_token", f"its text holds {tokens[0]}")


def common_size(images: list[Path], policy: MediaPolicy) -> tuple[int, int]:
    """Return the (width, height) that all images of a question share.

    Raises:
        LeftOut: the sizes differ, so thousandths would be ambiguous.
    """
    sizes = {image_size(str(path), policy) for path in images}
    if len(sizes) > 1:
        raise LeftOut("several_sizes", "its boxes cannot be normalised: its images differ in size")
    height, width = sizes.pop()
    return width, height


def normalised(answer: str, width: int, height: int) -> str:
    """Convert boxes in pixels to thousandths of width and height, rounded and clamped to 0 to 1000.

    Raises:
        LeftOut: the answer contains numbers but no box in brackets.
    """
    if not BOX.search(answer) and any(char.isdigit() for char in answer):
        raise LeftOut("unreadable_boxes", f"its boxes cannot be read: {answer[:80]!r}")

    def scale(box: Box) -> list[int]:
        sides = (width, height, width, height)
        return [min(max(round(value / side * 1000), 0), 1000) for value, side in zip(box, sides, strict=True)]

    return map_boxes(answer, scale)
