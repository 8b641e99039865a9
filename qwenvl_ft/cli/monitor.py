"""``qwenvl-ft monitor DIR``: shows the progress of a run from its log files, and the load of the GPUs."""

import json
import shutil
import subprocess
import sys
import time
from collections import deque
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

BLOCKS = "▁▂▃▄▅▆▇█"
WINDOW = 20
"""Number of logged steps in the moving average of the loss."""
WIDTH = 60
"""Width of the progress bar and of the loss history, in characters."""
GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
FIGURES = ("grad_norm", "learning_rate", "tokens_per_second", "row_fill", "peak_memory_gib", "eval_loss")
"""Logged keys whose last value is shown."""


def monitor(
    directory: Annotated[Path | None, typer.Argument(help="training.output_dir of the run.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", "--output-dir", help="Same as DIRECTORY.")] = None,
    refresh: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 10.0,
    tail: Annotated[
        int | None, typer.Option(min=1, help="Print this many last lines of training.log and exit.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and exit; the default if the output is not a terminal.")
    ] = False,
) -> None:
    """Show progress, loss, speed and remaining time of a run, and the GPUs of this machine, until the run ends.

    Raises:
        RecipeError: no folder is named, or several are.
        CheckpointError: the folder is not that of a run.
    """
    from qwenvl_ft.errors import CheckpointError, RecipeError

    named = {folder for folder in (directory, output_dir) if folder is not None}
    if len(named) != 1:
        raise RecipeError("name one folder, the run's training.output_dir: qwenvl-ft monitor output/my_run.")
    folder = named.pop()
    log = folder / "training.log"
    if not log.is_file():
        raise CheckpointError(f"{log} does not exist. Name a run's training.output_dir; it is written at its start.")
    if tail is not None:
        with log.open(encoding="utf-8") as lines:
            typer.echo("".join(deque(lines, tail)), nl=False)
        return
    if once or not sys.stdout.isatty():
        typer.echo(screen(folder))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text(screen(folder)), auto_refresh=False, screen=False) as live:
        while not ended(entries(folder)):
            time.sleep(refresh)
            live.update(Text(screen(folder)), refresh=True)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the logged entries in order of steps; in a run with phases, those of the last phase.

    A resumed run appends to the log: of steps that were run twice, only the later entries are returned. An incomplete
    last line is ignored.
    """
    path = folder / "trainer_log.jsonl"
    logged: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if logged and phase_of(entry) != phase_of(logged[-1]):
            logged = []
        if logged and entry["step"] < logged[-1]["step"]:
            logged = [kept for kept in logged if kept["step"] < entry["step"]]
        logged.append(entry)
    return logged


def ended(logged: list[dict[str, Any]]) -> bool:
    """Return True if the last entry ends the run, or the last of its phases."""
    if not logged or "train_loss" not in logged[-1]:
        return False
    number, _, count = phase_of(logged[-1]).partition(" ")[0].partition("/")
    return number == count


def phase_of(entry: dict[str, Any]) -> str:
    """Return the phase of an entry, for example ``2/3 medium``; empty in a run without phases."""
    return entry["phase"] if "phase" in entry else ""


def screen(folder: Path) -> str:
    """Return the lines that describe a run and the GPUs."""
    logged = entries(folder)
    steps = [entry for entry in logged if "loss" in entry]
    lines = [str(folder), *(progress(logged, steps) if steps else ["no step is logged yet; see training.log"])]
    return "\n".join([*lines, *gpus()])


def progress(logged: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    """Return progress bar, times, loss with its history, and the last values of the other figures."""
    last = logged[-1]
    share = last["step"] / last["total_steps"]
    bar = "#" * round(share * WIDTH)
    losses = [entry["loss"] for entry in steps]
    known: dict[str, Any] = {}
    for entry in logged:
        known |= entry
    left = "ended" if ended(logged) else f"left {_clock(known['eta_seconds'])}" if "eta_seconds" in known else ""
    figures = "  ".join(f"{name} {known[name]:.4g}" for name in FIGURES if name in known)
    phase = phase_of(last)
    return [
        *([f"phase {phase}"] if phase else []),
        f"[{bar:<{WIDTH}}] {share:.1%}  step {last['step']:,} of {last['total_steps']:,}",
        f"elapsed {_clock(last['elapsed_seconds'])}  {left}".rstrip(),
        f"loss {losses[-1]:.4f}  mean of the last {min(WINDOW, len(losses))}: {fmean(losses[-WINDOW:]):.4f}",
        history(losses),
        *([figures] if figures else []),
    ]


def history(values: list[float], width: int = WIDTH) -> str:
    """Draw values as at most ``width`` block characters, each the mean of its share, between minimum and maximum."""
    count = min(width, len(values))
    edges = [len(values) * k // count for k in range(count + 1)]
    means = [fmean(values[first:last]) for first, last in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    drawn = "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in means)
    return f"{high:.3f} {drawn} {low:.3f}" if means[0] >= means[-1] else f"{low:.3f} {drawn} {high:.3f}"


def gpus() -> list[str]:
    """Return one line per GPU with load, memory and temperature, or one line that says why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["nvidia-smi is not installed: GPUs are not shown"]
    query = [tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    if done.returncode != 0:
        return [f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())}"]
    rows = (line.split(", ") for line in done.stdout.splitlines() if line.strip())
    return [
        f"GPU {index} {name}: {load}% busy, {used} of {total} MiB, {heat} C"
        for index, name, load, used, total, heat in rows
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
