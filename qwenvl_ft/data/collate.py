"""Joins samples into one flat row in which each attends only to itself: the batch that training uses.

Letters: T tokens of the row, S samples in it, K supervised tokens, P patches, N images, F frames (images, or pairs of
frames of videos).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.data.conversation import IGNORE, Sample, Source
from qwenvl_ft.data.share import RowCheck, Share

MEDIA = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""Keys of pixels and grids, for images and for videos."""


ASIDE = ("labels", "label_weights", "sources", "faults", "check")
"""Keys of a batch that are no arguments of the model."""


class QwenVLCollator:
    """Joins samples into one row.

    Row 0 of ``position_ids`` restarts at 0 with every sample. Transformers treats each restart as a sample boundary,
    but only without an ``attention_mask`` and with the text model's ``use_cache`` off, as `load_model` leaves it.

    Args:
        fillers: tiny unsupervised samples (`vision_fillers`), added if a row has no sample with their medium. With
            them every rank runs the vision tower in every pass, which sharded training needs. They attend only to
            themselves, so no logit, loss or gradient of the row's samples changes.
        places: computes what the model's towers would derive from ids and grids (`MediaPlaces`); added to the batch.
        share: this rank's share of rows that several ranks train together; None for whole rows.

    Returns (of a call):
        ``input_ids`` int64[1, T], ``labels`` int64[1, T], ``position_ids`` int64[4, 1, T] as (text, time, height,
        width), ``cu_seq_lens_q`` and ``_k`` int32[S+1] (cumulative lengths, fillers included), ``max_length_q`` and
        ``_k`` (tokens of the longest sample), ``label_weights`` float64[1, T] if a sample has some, ``sources``, a list
        of S sources, and ``faults`` if placeholders replace samples (`SampleDataset`).
        If there are images, ``pixel_values`` float32[P, C] (or raw, uint8[P, C / 2]), ``image_grid_thw`` int64[N, 3],
        ``image_cu_seqlens`` int32[frames + 1] (cumulative patches of the frames) and ``image_max_seqlen`` (patches of
        the largest frame). If there are videos, the same with their own keys. The cumulative lengths are computed here
        because attention would have to wait for the device to get them.
        With ``share``, the row has a multiple of ``share.size`` tokens, pixels and grids are those of this rank's own
        frames, and further keys say whose the others are; see `Share`.

    Example:
        Lengths 3 and 2 give text positions ``[0, 1, 2, 0, 1]``.
    """

    def __init__(
        self,
        fillers: Sequence[Sample] = (),
        places: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None,
        share: Share | None = None,
    ) -> None:
        self.fillers = tuple(fillers)
        self.places = places
        self.share = share

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if not samples:
            raise ValueError("a batch needs at least one sample")
        row = filled(samples, self.fillers)
        if self.share is not None:
            row = self.share.padded(row)
        text = torch.cat([torch.arange(len(sample["input_ids"])) for sample in row])
        axes = torch.cat([sample["position_ids"] for sample in row], dim=1)
        batch: dict[str, Any] = {
            "input_ids": torch.cat([sample["input_ids"] for sample in row])[None],
            "labels": torch.cat([sample["labels"] for sample in row])[None],
            "position_ids": torch.cat([text[None], axes])[:, None],
        }
        lengths = torch.tensor([len(sample["input_ids"]) for sample in row])
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = _borders(lengths)
        batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
        if weights := _label_weights(row):
            batch["label_weights"] = torch.cat(weights)[None]
        batch |= joined_media(row)
        if self.share is not None:
            batch |= self.share.own_media(row, self.fillers)
            batch["check"] = RowCheck.of(samples)
        for kind in ("image", "video"):
            if f"{kind}_grid_thw" in batch:
                frames, height, width = batch[f"{kind}_grid_thw"].T
                patches = (height * width).repeat_interleave(frames)
                batch[f"{kind}_cu_seqlens"], batch[f"{kind}_max_seqlen"] = _borders(patches), int(patches.max())
        if self.places is not None:
            batch |= self.places(batch)
        return batch | _origins(samples)


class PaddedCollator:
    """Makes right-padded rows of one sample each, as most trainers do; for comparison (``padding_free: false``).

    Args:
        pad_id: id of the padding token.
        fillers: as for `QwenVLCollator`; each becomes a row.

    Returns (of a call):
        As `QwenVLCollator`, but with S rows as long as the longest sample: ``input_ids``, ``labels`` and
        ``attention_mask`` int64[S, T], ``position_ids`` int64[3, S, T].
    """

    def __init__(self, pad_id: int, fillers: Sequence[Sample] = ()) -> None:
        self.pad_id = pad_id
        self.fillers = tuple(fillers)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        def rows(tensors: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        members = filled(samples, self.fillers)
        positions = rows([sample["position_ids"].T for sample in members], 0)  # [S, T, 3]
        batch: dict[str, Any] = {
            "input_ids": rows([sample["input_ids"] for sample in members], self.pad_id),
            "labels": rows([sample["labels"] for sample in members], IGNORE),
            "attention_mask": rows([torch.ones_like(sample["input_ids"]) for sample in members], 0),
            "position_ids": positions.permute(2, 0, 1).contiguous(),
        }
        if weights := _label_weights(members):
            batch["label_weights"] = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True, padding_value=1)
        batch |= joined_media(members)
        return batch | _origins(samples)


def _label_weights(samples: Sequence[Sample]) -> list[Tensor]:
    """Return the weights of each sample's labels; an empty list if no sample has any."""
    if not any("label_weights" in sample for sample in samples):
        return []
    return [sample.get("label_weights", torch.ones(len(sample["labels"]), dtype=torch.float64)) for sample in samples]


def _origins(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return the batch's ``sources``, and its ``faults`` if a sample is a placeholder."""
    origins: dict[str, list[Any]] = {"sources": [sample["source"] for sample in samples]}
    faults = [sample["fault"] for sample in samples if "fault" in sample]
    return origins | ({"faults": faults} if faults else {})


def filled(samples: Sequence[Sample], fillers: Sequence[Sample]) -> list[Sample]:
    """Append the filler of each medium that no sample has."""
    absent = [
        filler
        for filler in fillers
        if not any(grids in filler and grids in sample for _, grids in MEDIA for sample in samples)
    ]
    return [*samples, *absent]


def _borders(lengths: Tensor) -> Tensor:
    """Return int32[n + 1]: 0 followed by the cumulative sums."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def joined_media(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Concatenate the pixels and grids of all samples; keys of a medium that no sample has are absent."""
    keys = [key for pair in MEDIA for key in pair]
    parts = {key: [s[key] for s in samples if key in s] for key in keys}  # type: ignore[literal-required]
    return {key: torch.cat(tensors) for key, tensors in parts.items() if tensors}


def tokens_per_sample(batch: dict[str, Any]) -> Tensor:
    """Return int64[S]: the tokens of each sample of a flat row, fillers included."""
    borders: Tensor = batch["cu_seq_lens_q"]
    return borders.diff().long()


def vision_fillers(processor: Any, kinds: Sequence[str] = ("image",), *, raw_pixels: bool = False) -> list[Sample]:
    """Make an unsupervised sample for each kind of medium: one merged patch between the two vision tokens.

    Args:
        kinds: ``image``, ``video``.
        raw_pixels: make images as raw patches; must equal the setting of the samples' `Encoder`.
    """
    ids = processor.tokenizer.convert_tokens_to_ids
    fillers: list[Sample] = []
    for kind in kinds:
        part = processor.image_processor if kind == "image" else processor.video_processor
        pixels, grid = MEDIA[0] if kind == "image" else MEDIA[1]
        side = part.merge_size
        raw = raw_pixels and kind == "image"
        dim = 3 * part.patch_size**2 * (1 if raw else part.temporal_patch_size)
        tokens = torch.tensor(ids(["<|vision_start|>", f"<|{kind}_pad|>", "<|vision_end|>"]))
        filler: dict[str, Any] = {
            "input_ids": tokens,
            "labels": torch.full_like(tokens, IGNORE),
            "position_ids": torch.arange(3).expand(3, 3),
            pixels: torch.zeros(side * side, dim, dtype=torch.uint8 if raw else torch.float32),
            grid: torch.tensor([[1, side, side]]),
            "source": Source("filler", "filler"),
        }
        fillers.append(filler)  # type: ignore[arg-type]
    return fillers
