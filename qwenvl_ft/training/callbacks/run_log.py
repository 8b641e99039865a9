"""The log of a run: lines (on a terminal also a progress bar) on the console, and two files beside the checkpoints.

``training.log`` is for people and `tail -f`; ``trainer_log.jsonl`` has one object per line, with ``step``,
``total_steps`` and ``elapsed_seconds``, for monitors and plots. The phases of a run share both files, in the run's
folder; each line names its ``phase``.
"""

import json
import re
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from qwenvl_ft.evaluation.metrics import GEOMETRY, METRICS

LOG, JSONL = "training.log", "trainer_log.jsonl"
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "skipped_steps": ("skipped steps", "{:,}"),
    "eval_loss": ("eval_loss", "{:.4f}"),
    "eval_perplexity": ("perplexity", "{:.3f}"),
    "grad_norm": ("grad_norm", "{:.3f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "lr/vision": ("lr/vision", "{:.2e}"),
    "lr/merger": ("lr/merger", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "supervised_tokens": ("supervised", "{:,}"),
    "row_fill": ("fill", "{:.1%}"),
    "samples_seen": ("samples", "{:,}"),
    "bad_samples": ("left out", "{:,}"),
    "peak_memory_gib": ("GiB", "{:.2f}"),
    "train_loss": ("train_loss", "{:.4f}"),
    "train_runtime": ("seconds", "{:.1f}"),
    "epoch": ("epoch", "{:.2f}"),
}
"""Logged key -> its name and format on the console. Other keys are only in ``trainer_log.jsonl``."""
ANSWERS = re.compile(rf"eval_(?:{'|'.join(METRICS)})|eval_{GEOMETRY}_(?:bbox|quad|line)_f1")
"""Logged keys of generated answers that are shown on the console."""


def describe(logs: dict[str, Any]) -> str:
    """Format the figures of a log entry as one line."""
    figures = [f"{name} {spec.format(logs[key])}" for key, (name, spec) in SHOWN.items() if key in logs]
    figures += [f"{key.removeprefix('eval_')} {logs[key]:.4f}" for key in logs if ANSWERS.fullmatch(key)]
    figures += [f"{key} {logs[key]:.4f}" for key in logs if re.fullmatch(r"eval_\w+_loss", key)]
    if "eta_seconds" in logs:
        figures.append(f"eta {timedelta(seconds=int(logs['eta_seconds']))}")
    return "  ".join(figures) or str(logs)


class RunLog(TrainerCallback):
    """Writes both files and the console, on rank 0.

    Args:
        phase: number and name of the phase, as ``2/3 medium``; its files are in the folder of the whole run.
    """

    def __init__(self, phase: str = "") -> None:
        self.phase = phase
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.start = time.perf_counter()
        self.folder = Path()
        self._unwritten: set[str] = set()

    def follow(self, args: Any) -> None:
        """Write the files into the folder of a run from now on."""
        folder = Path(args.output_dir)
        self.folder = folder.parent if self.phase else folder

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self.start = time.perf_counter()
        self.follow(args)
        if not state.is_world_process_zero:
            return
        sampler = train_dataloader.batch_sampler
        size = sampler.step_size(sampler.dataset.present)
        self.write(f"{state.max_steps:,} steps of {size}; from step {state.global_step}")
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns)
            self.progress.start()
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Write what each further window of a stream holds; `announce` has written it of the first one."""
        dataset = train_dataloader.batch_sampler.dataset
        if state.is_world_process_zero and dataset.present > dataset.first:
            for line in (dataset.summary(), *dataset.remarks()):
                self.write(line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.follow(args)
        entry = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "elapsed_seconds": round(time.perf_counter() - self.start, 2),
            **({"phase": self.phase} if self.phase else {}),
            **logs,
        }
        self._append(JSONL, json.dumps(entry, ensure_ascii=False, default=float))
        if self.progress is not None and self.task is not None and "loss" in logs:
            self.progress.update(self.task, description=describe({k: logs[k] for k in ("loss",) if k in logs}))
        self.write(f"step {state.global_step}/{state.max_steps}  {describe(logs)}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.write(f"saved {Path(args.output_dir) / f'checkpoint-{state.global_step}'}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the progress bar; one that is left after an error would forbid the next run its own."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def write(self, line: str) -> None:
        """Write one line to the console and to ``training.log``."""
        line = f"phase {self.phase}: {line}" if self.phase else line
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)
        self._append(LOG, f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}")

    def _append(self, name: str, line: str) -> None:
        """Append a line to a file; a full disk costs the line, not the run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            if name not in self._unwritten:
                self._unwritten.add(name)
                print(f"{self.folder / name} cannot be written: {error.strerror}; training goes on", flush=True)
