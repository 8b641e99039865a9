"""What can be wrong with data: the table of all reasons."""

from dataclasses import dataclass

ANNOTATION, IMAGE, MODEL = PARTS = ("Annotation", "Image", "Model")
"""The three tests that the summary speaks of."""
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Reason:
    """A kind of fault."""

    part: str
    level: str
    """An error stops training or spoils what it learns or measures; a warning is worth a look."""
    told: str


REASONS: dict[str, Reason] = {
    "file": Reason(ANNOTATION, ERROR, "a file that is not there or cannot be read"),
    "json": Reason(ANNOTATION, ERROR, "not valid JSON, or not UTF-8"),
    "structure": Reason(ANNOTATION, ERROR, "no format reads it, or a value is malformed"),
    "tags": Reason(ANNOTATION, ERROR, "<image> and <video> tags do not match the media"),
    "geometry": Reason(ANNOTATION, ERROR, "coordinates that are outside the image, reversed or of a wrong count"),
    "empty_answer": Reason(ANNOTATION, ERROR, "an answer without text, which would be learned"),
    "unsupervised": Reason(ANNOTATION, ERROR, "nothing in it is learned"),
    "leak_record": Reason(ANNOTATION, ERROR, "a validation record that is also trained on"),
    "leak_media": Reason(ANNOTATION, ERROR, "validation media that are also trained on, in another record"),
    "duplicate": Reason(ANNOTATION, WARNING, "the same media and text as an earlier record"),
    "missing": Reason(IMAGE, ERROR, "a media file that does not exist"),
    "corrupt": Reason(IMAGE, ERROR, "a medium that cannot be opened or decoded"),
    "size": Reason(IMAGE, ERROR, "an image that has not the size that is stated"),
    "too_long": Reason(MODEL, WARNING, "longer than template.max_length: left out"),
    "cut": Reason(MODEL, WARNING, "longer than template.max_length: cut"),
    "encoding": Reason(MODEL, ERROR, "the processor cannot make a sample of it"),
    "unforeseen": Reason(MODEL, ERROR, "an error that no check foresaw: please report it"),
}
"""Reason -> what it is, in the order in which reports have it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One case."""

    reason: str
    where: str
    """``file.jsonl:12`` (line, from 1), ``file.json[3]`` (entry, from 0), or a file."""
    message: str
    id: str = ""
