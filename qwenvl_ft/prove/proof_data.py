"""Chooses the samples of a proof: real records of every kind in the data, or generated records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Image, Source, Video
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.epochs import RecordEpochs, open_epochs
from qwenvl_ft.data.sources.mixture import load_mixture
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.recipe.schema import Recipe

CANDIDATES = 200
"""Number of records, spread evenly over the data, whose lengths are measured before samples are chosen."""
WORDS = "a small red circle lies near the left edge and one large blue square stands behind it under bright light"
GENERATED = "generated"
TEXT = 1
"""Number of a generated record of text alone, with the longest answer."""


class FewRecords:
    """A few records in the form of `load_records`: (record, source, folder of relative media)."""

    def __init__(self, records: Sequence[tuple[Any, Source, str | None]], fingerprint: str) -> None:
        self.records = records
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, Source, str | None]:
        return self.records[index]


def proof_dataset(recipe: Recipe, encoder: Encoder, *, samples: int, max_tokens: int, folder: Path) -> SampleDataset:
    """Build the data set of a proof.

    Args:
        recipe: the proof's recipe; without ``data.train`` the records are generated.
        folder: folder of the cache of lengths.

    Raises:
        DataError: the data cannot be read.
        RecipeError: fewer than two samples fit.
    """
    seed = int(recipe.training.arguments["seed"])
    if not recipe.data.train:
        few = generated_records(encoder, samples)
        dataset = _dataset(recipe, few, encoder, seed, folder)
        return _enough(dataset, recipe)
    records, _ = load_mixture(recipe.data, seed)
    spread = np.unique(np.linspace(0, len(records) - 1, min(len(records), CANDIDATES)).round().astype(int))
    first = [records[int(place)] for place in spread]
    dataset = _dataset(recipe, FewRecords(first, f"{records.fingerprint}-{len(spread)}"), encoder, seed, folder)
    if isinstance(dataset.epochs, RecordEpochs):
        places = _chosen(dataset, samples, max_tokens)
        chosen = [first[int(dataset.index[k])] for k in places]
        if len({_supervised(dataset, k) for k in places}) == 1:
            # With answers of one length a mean of the samples' means is the mean over tokens: the fault would not show.
            chosen = [*chosen[: samples - 1], (_record(TEXT), Source(GENERATED, f"{GENERATED}[{TEXT}]"), None)]
    else:  # dense captions form groups
        chosen = first[: samples * recipe.data.images_per_user_turn]
    key = f"{records.fingerprint}-{'-'.join(str(source) for _, source, _ in chosen)}"
    return _enough(_dataset(recipe, FewRecords(chosen, key), encoder, seed, folder), recipe)


def _dataset(recipe: Recipe, records: Any, encoder: Encoder, seed: int, folder: Path) -> SampleDataset:
    epochs = open_epochs(
        records,
        DenseOptions.of(recipe, seed),
        augmenter=Augmenter.from_config(recipe.data.augmentation),
        training=True,
        policy=encoder.policy,
    )
    return SampleDataset(epochs, encoder, name="data.train", cache_dir=folder)


def _enough(dataset: SampleDataset, recipe: Recipe) -> SampleDataset:
    if len(dataset) < 2:
        raise RecipeError(
            f"a proof needs two samples, but only {len(dataset)} fit into template.max_length="
            f"{recipe.template.max_length}. Raise it, or use other data."
        )
    return dataset


def _chosen(dataset: SampleDataset, samples: int, max_tokens: int) -> list[int]:
    """Choose samples of each kind in turn (text, one image, several, video), the shortest of each kind first."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for index in np.argsort(dataset.lengths, kind="stable").tolist():
        conversation = dataset.conversation(index)
        kind = min(len(conversation.media(Image)), 2), bool(conversation.media(Video))
        kinds.setdefault(kind, []).append(index)
    chosen: list[int] = []
    tokens = 0
    for turn in range(samples):
        for same in kinds.values():
            if turn < len(same) and len(chosen) < samples:
                more = int(dataset.lengths[same[turn]])
                if len(chosen) < 2 or tokens + more <= max_tokens:
                    chosen.append(same[turn])
                    tokens += more
    return chosen


def _supervised(dataset: SampleDataset, index: int) -> int:
    """Return the number of supervised tokens of a sample; no pixel is decoded."""
    return int(dataset.encoder.draft(dataset.conversation(index)).supervised.sum())


def generated_records(encoder: Encoder, count: int) -> FewRecords:
    """Generate records of each kind in turn: an image, text, two images, a larger image, and a video if possible.

    The lengths of the answers differ widely, which exposes a mean of means.
    """
    records = [_record(index) for index in range(count)]
    try:
        encoder.length(_record(4))
    except DataError:  # a processor without videos
        records = [_record(index + index // 4) for index in range(count)]
    listed = [(record, Source(GENERATED, f"{GENERATED}[{k}]"), None) for k, record in enumerate(records)]
    return FewRecords(listed, f"{GENERATED}-{count}")


def _record(index: int) -> dict[str, Any]:
    kind, seed = index % 5, index
    words = WORDS.split()
    answer = " ".join(words[(seed + k) % len(words)] for k in range((3, 17, 1, 8, 5)[kind])) + "."
    images, video = (1, 0, 2, 1, 0)[kind], kind == 4
    tags = "<image>\n" * images + "<video>\n" * video
    turns = [{"from": "human", "value": f"{tags}What is this, number {index}?"}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": f"{index}", "conversations": turns}
    if images:
        sizes = ((224, 160),) if kind == 3 else ((96, 64), (64, 128))
        record["image"] = [_picture(*size, seed + k) for k, size in enumerate(sizes[:images])]
    if video:
        record["video"] = [[_picture(64, 64, seed + k) for k in range(4)]]
    return record


def _picture(width: int, height: int, seed: int) -> PILImage.Image:
    """Draw smooth noise, which survives resizing."""
    rng = np.random.default_rng([width, height, seed])
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize((width, height), PILImage.Resampling.BICUBIC)
