"""Measures throughput and row fill of a run from the plan, so that the ranks need not communicate."""

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

from qwenvl_ft.data.plan.sampler import PlanSampler, seen_samples


class Meter(TrainerCallback):
    """Counts tokens, samples and seconds between two log lines, over all ranks.

    All ranks compute the same plan and so know each other's rows; only supervised tokens are counted in the batches.

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

    def follow(self, sampler: PlanSampler, row_tokens: int | None) -> None:
        """Count by this plan from now on.

        Args:
            row_tokens: tokens that fit into a rank's micro-batch; None if rows are not packed.
        """
        self.sampler, self._sums = sampler, {}
        self.row_tokens = row_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count at the state's step, which is not 0 in a resumed run."""
        self._first_step = state.global_step
        self._passes, self._tokens = self._up_to(state.global_step)[:2]
        self._supervised = []
        self._time = self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside this context, for evaluation and saving."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - begin

    def supervised(self, count: Tensor) -> None:
        """Add an optimizer step's supervised tokens, a scalar over all ranks that stays on its device until `read`."""
        self._supervised.append(count)

    def read(self, state: Any) -> dict[str, float]:
        """Return the figures since the last reading; waits for the device."""
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        supervised = int(torch.stack(self._supervised).sum()) if self._supervised else 0
        assert self.sampler is not None
        passes, tokens, samples = self._up_to(state.global_step)
        fresh = tokens - self._tokens
        places = (passes - self._passes) * (self.row_tokens or 0) * self.sampler.shape.data_ranks
        done = state.global_step - self._first_step
        figures = {
            "tokens_per_second": round(fresh / seconds, 1),
            "supervised_tokens": supervised,
            **({"row_fill": round(fresh / places, 4)} if places else {}),
            "samples_seen": samples,
            "eta_seconds": round((now - self._start) / max(done, 1) * (state.max_steps - state.global_step), 1),
        }
        self._time, self._passes, self._tokens, self._supervised = now, passes, tokens, []
        return figures

    def _up_to(self, step: int) -> tuple[int, int, int]:
        """Return micro-batches, tokens and samples from the beginning of training to the end of a step."""
        assert self.sampler is not None
        epoch, steps = self.sampler.locate(step)
        _, passes, tokens, samples = self.sampler.before(epoch)
        begun = min(steps * self.args.gradient_accumulation_steps, self.sampler.passes(epoch)) if steps else 0
        if begun:
            running_tokens, running_samples = self._running(epoch)
            tokens += int(running_tokens[begun - 1])
            samples += int(running_samples[begun - 1])
        return passes + begun, tokens, samples

    def _running(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return running sums of tokens and samples over the micro-batches of an epoch."""
        if epoch not in self._sums:
            assert self.sampler is not None
            lengths, plan = self.sampler.dataset.at(epoch).tokens, self.sampler.plan(epoch)
            tokens = [sum(int(lengths[i]) for batch in ranks for i in batch if i >= 0) for ranks in plan]
            self._sums = {epoch: (np.cumsum(tokens), np.cumsum([seen_samples(ranks) for ranks in plan]))}
        return self._sums[epoch]


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far, in GiB: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
