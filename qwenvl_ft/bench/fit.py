"""Fits the cost of tokens, patches and their squares on this machine, by timing steps over very different rows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenvl_ft.bench.sizes import bench_processor, make_config, random_model
from qwenvl_ft.bench.workload import sized_record
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.costs import CostModel, save_costs
from qwenvl_ft.errors import BenchError
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.loss import loss_sum, split_labels

EXPLAINED = 0.9
"""Minimum share of the variance that a fit must explain to be saved."""


@dataclass(frozen=True)
class RowShape:
    """A row of equal samples."""

    samples: int
    tokens: int
    """Tokens of each sample, including its image."""
    image: int = 0
    """Image tokens of each sample; an image token is 4 patches."""


def row_shapes(row_length: int) -> list[RowShape]:
    """Return rows that separate the four costs: few long samples and many short ones, with and without images."""
    shapes = []
    for samples in (1, 4, 16):
        length = row_length // samples
        shapes += [RowShape(samples, length), RowShape(samples, length // 2)]
        shapes += [RowShape(samples, length, length // 2), RowShape(samples, length, length * 3 // 4)]
    return shapes


def bench_fit(size: str, *, row_length: int, rounds: int = 2, trains_vision: bool = True) -> tuple[CostModel, float]:
    """Fit the cost model.

    Args:
        row_length: tokens of the longest row that is timed.
        trains_vision: False if the vision tower will be frozen, which cuts the cost of patches to a third.

    Returns:
        The model, and the share of the variance of the measured times that it explains.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = [f"model.torch_dtype={'bfloat16' if device.type == 'cuda' else 'float32'}"]
    model = random_model(make_config(size), load_recipe(None, settings).model, device).train()
    if not trains_vision:
        model.model.visual.requires_grad_(False)
    processor = bench_processor(size)
    use_raw_patches(model, processor.image_processor)
    encoder, collator = Encoder(processor, raw_pixels=True), QwenVLCollator()
    features, seconds = [], []
    for shape in row_shapes(row_length):
        record = sized_record(processor.tokenizer, shape.tokens, shape.image)
        batch = collator([encoder(record)] * shape.samples)
        lengths = batch["cu_seq_lens_q"].diff().double()
        patches = batch["image_cu_seqlens"].diff().double() if "image_cu_seqlens" in batch else torch.zeros(1)
        sums = (lengths.sum(), patches.sum(), lengths.square().sum(), patches.square().sum())
        features.append([float(value) for value in sums])
        seconds.append(min(_step_seconds(model, batch, device) for _ in range(rounds + 1)))
    return fitted(np.asarray(features), np.asarray(seconds))


def fitted(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[CostModel, float]:
    """Fit non-negative costs by least squares of relative errors, plus a constant for overhead.

    Args:
        features: float64[R, 4], sums over each of R rows of tokens, patches and their squares.
        seconds: float64[R], measured time of each row.

    Returns:
        The model, and the share of the variance that it explains.
    """
    whole = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    scale = whole.max(axis=0)
    scaled = whole / scale / seconds[:, None]
    used = list(range(5))
    while True:
        found = np.zeros(5)
        found[used] = np.linalg.lstsq(scaled[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            break
        used.remove(int(found.argmin()))
    found /= scale
    rest = seconds - whole @ found
    explained = 1 - float((rest**2).sum() / ((seconds - seconds.mean()) ** 2).sum())
    token = found[0] or found[found > 0].min()
    return CostModel(*(float(cost / token) for cost in found[1:4])), explained


def keep(costs: CostModel, explained: float) -> Path:
    """Save a fit.

    Raises:
        BenchError: the fit explains less than `EXPLAINED` of the variance.
    """
    if explained < EXPLAINED:
        raise BenchError(
            f"the fit explains {explained:.0%} of the variance of the measured times, less than {EXPLAINED:.0%}, and "
            "was not saved: the machine was busy or the rows too short. Use an idle machine or a larger --row-length."
        )
    return save_costs(costs)


def _step_seconds(model: Any, batch: dict[str, Any], device: torch.device) -> float:
    inputs = {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in split_labels(batch).items()
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = loss_sum(model, inputs)
    loss.backward()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
