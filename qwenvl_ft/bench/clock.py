"""Times the steps of a benchmark and records what their rows hold."""

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qwenvl_ft.bench.flops import Row
from qwenvl_ft.upstream.media import SHARE


class Clock(TrainerCallback):
    """Times the steps after the warm-up and records the rows; synchronises with the device only at start and end.

    Of ranks that share a row, the first records its tokens; each records the frames and labels that it has itself.
    """

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.last = device, warmup, warmup + steps
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.seen: list[tuple[int, Tensor, Tensor | None, int | Tensor]] = []
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.register_forward_pre_hook(self._see, with_kwargs=True)
        self._tick()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        if self.step <= self.last:
            self._tick()

    def rows(self) -> list[Row]:
        """Return this rank's part of the rows of the measured steps."""
        measured = [entry[1:] for entry in self.seen if self.warmup <= entry[0] < self.last]
        return [
            Row(text.diff().tolist(), [] if vision is None else vision.diff().tolist(), int(supervised))
            for text, vision, supervised in measured
        ]

    def seconds(self) -> list[float]:
        """Return the seconds of each measured step."""
        ends = self.ends[self.warmup : self.last + 1]
        return [after - before for before, after in pairwise(ends)]

    def _tick(self) -> None:
        at_an_end = self.step in (self.warmup, self.last)
        self.ends.append(now(self.device) if at_an_end else time.perf_counter())
        self.cpu.append(time.process_time())

    def _see(self, module: nn.Module, positional: Any, inputs: dict[str, Any]) -> None:
        text = inputs["cu_seq_lens_q"] if "cu_seq_lens_q" in inputs else _borders(inputs["attention_mask"])
        kept = inputs["logits_to_keep" if "logits_to_keep" in inputs else "predicting"]  # packed row or padded batch
        supervised = kept.sum() if kept.dtype == torch.bool else kept.numel()
        share, frames = inputs.get(SHARE), _frames(inputs)
        if share is not None and share.group.place > 0:
            text = text[:0]
        if share is not None and not share.features.get("image"):
            frames = None  # a frame that belongs to no token
        self.seen.append((self.step, text, frames, supervised))


def _borders(mask: Tensor) -> Tensor:
    """Return int64[B + 1], the boundaries of a padded batch's samples without their padding."""
    return torch.nn.functional.pad(mask.sum(dim=1).cumsum(0), (1, 0))


def _frames(inputs: dict[str, Any]) -> Tensor | None:
    """Return int64[frames + 1], the boundaries of the images' patches; a padded batch has only their grids."""
    if "image_cu_seqlens" in inputs or "image_grid_thw" not in inputs:
        return inputs.get("image_cu_seqlens")
    frames, height, width = inputs["image_grid_thw"].unbind(dim=1)
    return torch.nn.functional.pad((height * width).repeat_interleave(frames).cumsum(0), (1, 0))


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
