"""What a run tells: a line (or, on a terminal, a bar) on the console, and two files beside the checkpoints.

``training.log`` is for people and `tail -f`; ``trainer_log.jsonl`` has one object per line, with ``step``,
``total_steps`` and ``elapsed_seconds``, for monitors and plots. The phases of a run share both, in the run's folder;
each line says its ``phase``.
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

LOG, JSONL = "training.log", "trainer_log.jsonl"
SHOWN = {
    "loss": ("loss", "{:.4f}"),
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
"""Logged key -> its name on the console and its form. Other keys are in the files alone."""


def describe(logs: dict[str, Any]) -> str:
    """The figures of a log entry on one line."""
    told = [f"{name} {form.format(logs[key])}" for key, (name, form) in SHOWN.items() if key in logs]
    told += [f"{key} {logs[key]:.4f}" for key in logs if re.fullmatch(r"eval_\w+_loss", key)]
    if "eta_seconds" in logs:
        told.append(f"eta {timedelta(seconds=int(logs['eta_seconds']))}")
    return "  ".join(told) or str(logs)


class ProgressCallback(TrainerCallback):
    """Writes both files and the console, from the first process alone.

    Args:
        phase: which of a run's phases this is, as ``2/3 medium``; their files are beside the phases' folders.
    """

    def __init__(self, phase: str = "") -> None:
        self.phase = phase
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.start = time.perf_counter()
        self.folder = Path()

    def follow(self, args: Any) -> None:
        """Take the folder of a run for the files."""
        folder = Path(args.output_dir)
        self.folder = folder.parent if self.phase else folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.perf_counter()
        self.follow(args)
        if not state.is_world_process_zero:
            return
        found = state.train_batch_size if args.auto_find_batch_size else None
        rows = found or args.per_device_train_batch_size
        batch = rows * args.gradient_accumulation_steps * args.world_size
        self.say(
            f"{state.max_steps:,} steps of {rows} rows x "
            f"{args.gradient_accumulation_steps} accumulated x {args.world_size} processes = {batch} rows; "
            f"from step {state.global_step}"
        )
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns)
            self.progress.start()
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

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
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / JSONL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, default=float) + "\n")
        if self.progress is not None and self.task is not None and "loss" in logs:
            self.progress.update(self.task, description=describe({k: logs[k] for k in ("loss",) if k in logs}))
        self.say(f"step {state.global_step}/{state.max_steps}  {describe(logs)}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.say(f"saved {Path(args.output_dir) / f'checkpoint-{state.global_step}'}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def say(self, line: str) -> None:
        """One line, on the console and in ``training.log``."""
        line = f"phase {self.phase}: {line}" if self.phase else line
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")
