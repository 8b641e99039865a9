"""How fast and how full the run is, read from the plan: no rank has to be asked and no device waited for."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from qwenvl_ft.data.plan.dataset import PlanSampler, seen_samples


class Meter(TrainerCallback):
    """Tokens, samples and seconds between two log lines, over all ranks.

    Every rank knows every rank's rows, because all make the same plan; only the number of supervised tokens comes from
    the batches.

    Args:
        args: TrainingArguments of the run.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.row_tokens: int | None = None
        self.sampler: PlanSampler | None = None
        self._supervised: list[Tensor] = []
        self._time = self._start = time.perf_counter()
        self._first_step = 0
        self._passes = self._tokens = 0
        self._sums: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._wholes: dict[int, tuple[int, int, int]] = {}

    def follow(self, sampler: PlanSampler, row_tokens: int | None) -> None:
        """The plan to read, and the places in one process's batch for its fill, or None where rows are not packed."""
        self.sampler, self._wholes = sampler, {}
        self.row_tokens = row_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The run starts, or goes on, at the state's step."""
        self._first_step = state.global_step
        self._passes, self._tokens = self._up_to(state.global_step)[:2]
        self._supervised = []
        self._time = self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's: evaluating, saving."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - begin

    def supervised(self, count: Tensor) -> None:
        """Supervised tokens of one optimizer step, over all ranks; stays on its device until it is read."""
        self._supervised.append(count)

    def read(self, state: Any) -> dict[str, float]:
        """What happened since the last reading, and starts the next."""
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        supervised = int(torch.stack(self._supervised).sum()) if self._supervised else 0
        passes, tokens, samples = self._up_to(state.global_step)
        fresh = tokens - self._tokens
        places = (passes - self._passes) * (self.row_tokens or 0) * self.args.world_size
        done = state.global_step - self._first_step
        told = {
            "tokens_per_second": round(fresh / seconds, 1),
            "supervised_tokens": supervised,
            **({"row_fill": round(fresh / places, 4)} if places else {}),
            "samples_seen": samples,
            "eta_seconds": round((now - self._start) / max(done, 1) * (state.max_steps - state.global_step), 1),
        }
        self._time, self._passes, self._tokens, self._supervised = now, passes, tokens, []
        return told

    def _up_to(self, step: int) -> tuple[int, int, int]:
        """Passes, tokens and samples from the beginning of training to the end of a step."""
        assert self.sampler is not None
        epochs, steps = self.sampler.locate(step)
        whole = [self._whole(epoch) for epoch in range(epochs)]
        passes, tokens, samples = (sum(column) for column in zip((0, 0, 0), *whole, strict=True))
        begun = steps * self.args.gradient_accumulation_steps
        if begun:
            running_tokens, running_samples = self._running(epochs)
            tokens += int(running_tokens[begun - 1])
            samples += int(running_samples[begun - 1])
        return passes + begun, tokens, samples

    def _whole(self, epoch: int) -> tuple[int, int, int]:
        """Passes, tokens and samples of an epoch."""
        assert self.sampler is not None
        same = self.sampler.dataset.measured_as(epoch)
        if same not in self._wholes:
            planned = self.sampler.dataset.at(epoch)
            self._wholes[same] = self.sampler.passes(epoch), int(planned.tokens.sum()), len(planned)
        return self._wholes[same]

    def _running(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Running sums of tokens and samples over the passes of an epoch."""
        if epoch not in self._sums:
            assert self.sampler is not None
            lengths, plan = self.sampler.dataset.at(epoch).tokens, self.sampler.plan(epoch)
            tokens = [sum(int(lengths[i]) for batch in ranks for i in batch if i >= 0) for ranks in plan]
            self._sums = {epoch: (np.cumsum(tokens), np.cumsum([seen_samples(ranks) for ranks in plan]))}
        return self._sums[epoch]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU's allocator, or of the process on the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
