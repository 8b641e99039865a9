"""Table of everything that can be wrong with data."""

from dataclasses import dataclass

ANNOTATION, IMAGE, MODEL = PARTS = ("Annotation", "Image", "Model")
"""The three tests of the summary."""
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Reason:
    """A kind of fault, with its default level."""

    part: str
    level: str
    """An error stops training or spoils its data or its metrics; a warning is worth a look."""
    meaning: str


REASONS: dict[str, Reason] = {
    "file": Reason(ANNOTATION, ERROR, "a file that does not exist or cannot be read"),
    "json": Reason(ANNOTATION, ERROR, "not valid JSON, not UTF-8, or a damaged row or archive"),
    "structure": Reason(ANNOTATION, ERROR, "in no known format, or a key or value that cannot be trained on"),
    "tags": Reason(ANNOTATION, ERROR, "<image> and <video> tags do not match the media"),
    "geometry": Reason(ANNOTATION, ERROR, "coordinates that are outside the image, reversed or of the wrong count"),
    "empty_answer": Reason(ANNOTATION, ERROR, "a supervised answer without text"),
    "unsupervised": Reason(ANNOTATION, ERROR, "no supervised token"),
    "leak_record": Reason(ANNOTATION, ERROR, "a validation record that is also in the training data"),
    "leak_media": Reason(ANNOTATION, ERROR, "validation media that are also in another training record"),
    "duplicate": Reason(ANNOTATION, WARNING, "the same media and text as an earlier record"),
    "missing": Reason(IMAGE, ERROR, "a media file that does not exist"),
    "corrupt": Reason(IMAGE, ERROR, "a medium that cannot be opened or decoded"),
    "too_large": Reason(IMAGE, ERROR, "an image or frame with more pixels than data.max_image_pixels"),
    "too_thin": Reason(IMAGE, ERROR, "an image or frame that is too thin for the processor"),
    "high_bit_depth": Reason(IMAGE, ERROR, "values deeper than 8 bits, and no setting of how to convert them"),
    "size": Reason(IMAGE, ERROR, "an image whose size differs from the stated one"),
    "too_long": Reason(MODEL, WARNING, "longer than template.max_length: left out"),
    "cut": Reason(MODEL, WARNING, "longer than template.max_length: cut"),
    "encoding": Reason(MODEL, ERROR, "the processor cannot encode it"),
    "unforeseen": Reason(MODEL, ERROR, "an unexpected error: please report it"),
}
"""Name -> reason, in the order of reports."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one record, file or group."""

    reason: str
    where: str
    """``file.jsonl:12`` (line, from 1), ``file.json[3]`` (entry, from 0), or a file."""
    message: str
    id: str = ""
