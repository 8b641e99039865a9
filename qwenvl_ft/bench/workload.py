"""Generates records for benchmarks from a seed: photo-like images, questions, answers of very different lengths."""

import io
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from qwenvl_ft.data.conversation import Source

PHOTOS = ((640, 480), (1024, 768), (1280, 960), (600, 800))
"""Sizes of the generated images, in pixels: typical of phones and the web, larger than in training."""
_TEXT = (
    "the image shows a small red circle near the left edge and large blue square behind it under bright light on dark "
    "table while two people walk along street with dog between green car white house one of them carries round object"
)
WORDS = tuple(_TEXT.split())
QUESTION = "Describe the image in detail."


class MemoryRecords:
    """Records in memory, in the form of `load_records`."""

    def __init__(self, records: list[dict[str, Any]], fingerprint: str) -> None:
        self.records = records
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Source, None]:
        return self.records[index], Source("bench", f"bench[{index}]"), None


def photo(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG of smooth noise in three octaves, which compresses and decodes as slowly as a photo."""
    rng = np.random.default_rng([width, height, seed])
    total = np.full((height, width, 3), rng.uniform(80, 170, 3), dtype=np.float32)
    for cells, weight in ((4, 90), (24, 40), (160, 18)):
        noise = rng.normal(0, weight, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        planes = [PILImage.fromarray(noise[..., k]).resize((width, height)) for k in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    file = io.BytesIO()
    PILImage.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_records(folder: Path, *, records: int, images: int, seed: int = 0) -> Path:
    """Write a .jsonl file of records with one or two images each (a tenth has none), and their JPEG files.

    Answers have 15 to 450 words, log-normally distributed, half of them below 80.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        (folder / f"{index:04d}.jpg").write_bytes(photo(*PHOTOS[index % len(PHOTOS)], seed + index))
    rng = np.random.default_rng(seed)
    shown = rng.choice(3, records, p=(0.1, 0.63, 0.27))
    words = rng.lognormal(4.4, 0.75, records).clip(15, 450).astype(int)
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(records):
            names = [f"{int(k):04d}.jpg" for k in rng.integers(0, images, shown[index])]
            question = "<image>\n" * len(names) + f"{QUESTION} Case {index}."
            turns = _turns(question, " ".join(rng.choice(WORDS, words[index])))
            file.write(json.dumps({"image": names} | turns if names else turns) + "\n")
    return path


def filled_records(
    tokenizer: Any,
    *,
    tokens: int,
    mean_sample: int,
    longest: int,
    image_share: float,
    supervised_share: float,
    seed: int = 0,
) -> MemoryRecords:
    """Generate records with ``tokens`` tokens in total, and the given shares of image and supervised tokens.

    Sample lengths are log-normal around ``mean_sample``; each sample has one image of whole merged patches (32 x 32
    pixels).
    """
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    total = 0
    while total < tokens:
        length = int(np.clip(mean_sample * rng.lognormal(-0.125, 0.5), 32, longest))
        records.append(sized_record(tokenizer, length, length * image_share, length * supervised_share, rng))
        total += length
    shares = f"{image_share}-{supervised_share}"
    return MemoryRecords(records, f"filled-{tokens}-{mean_sample}-{longest}-{shares}-{seed}")


def sized_record(
    tokenizer: Any, tokens: int, image: float, answer: float | None = None, rng: np.random.Generator | None = None
) -> dict[str, Any]:
    """Generate a record of about ``tokens`` tokens, with ``image`` image tokens and ``answer`` answer tokens.

    Args:
        answer: None is a quarter of ``tokens``.
    """
    rng = rng or np.random.default_rng(0)
    answer = tokens / 4 if answer is None else answer
    height, width = _grid(image)
    answer_text = _text(tokenizer, int(answer), rng)
    question = _text(tokenizer, max(tokens - height * width - int(answer) - 16, 1), rng)  # 16 for the template
    if not height:
        return _turns(question, answer_text)
    return {"image": [_pooled(32 * width, 32 * height)]} | _turns(f"<image>\n{question}", answer_text)


def _turns(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _grid(tokens: float) -> tuple[int, int]:
    """Return a nearly square (height, width) in merged patches for about ``tokens`` tokens; (0, 0) below 1."""
    if tokens < 1:
        return 0, 0
    height = max(1, int(tokens**0.5))
    return height, max(1, round(tokens / height))


@cache
def _pooled(width: int, height: int) -> bytes:
    return photo(width, height, 0)


def _text(tokenizer: Any, tokens: int, rng: np.random.Generator) -> str:
    """Return random words of about ``tokens`` tokens."""
    costs = _word_tokens(tokenizer)
    chosen: list[str] = []
    while tokens > 0:
        index = int(rng.integers(len(WORDS)))
        chosen.append(WORDS[index])
        tokens -= costs[index]
    return " ".join(chosen) or "Yes"


@lru_cache(maxsize=1)
def _word_tokens(tokenizer: Any) -> list[int]:
    return [len(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in WORDS]
