"""Kills small runs at random moments, restarts them until they end, and compares their weights with a quiet run's.

    make soak                                                   # among the other long tests
    python tests/kill_run.py --seeds 20 --minutes 40 --write    # write the table in docs/reliability.md

A seed determines the number of processes, the faults, and the share of the run's time at which each happens; which step
that is depends on the machine. A run that a fault ended is started again with ``resume_from_checkpoint=true``, at most
`MOST_STARTS` times, and has to end with the bits of a run that nothing disturbed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from marked_pages import write_between
from run_cases import short_run, write_questions
from safetensors.torch import load_file

from qwenvl_ft.train import LAUNCHED

STEPS, MOST_STARTS, LONGEST = 16, 8, 240
"""Steps of a run, largest number of starts, seconds after which a start counts as hanging."""
DISK = 256 << 20
"""Bytes of the disk that becomes full."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- by tests/kill_run.py -->", "<!-- end -->"
HEADER = "| seed | processes | faults, each with the number of logged lines | starts | weights |"


# -- a run and its starts ----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A small LoRA run with dropout over packed images; ``start`` begins it, or resumes it."""

    model: Path
    data: Path
    output: Path
    processes: int
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.starts += 1
        self.output.mkdir(parents=True, exist_ok=True)
        with self.printed_to.open("wb") as printed:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                self._command(), stdout=printed, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _command(self) -> list[str]:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "-m"]
        settings = short_run(
            self.model,
            self.data,
            self.output,
            "template.max_length=160",
            "tuner.train_type=lora",
            "tuner.lora_dropout=0.1",
            "tuner.freeze_vit=false",
            "training.learning_rate=1e-2",
            f"training.gradient_accumulation_steps={4 // self.processes}",
            f"training.max_steps={STEPS}",
            "training.save_strategy=steps",
            "training.save_steps=1",
            "training.save_total_limit=3",
            "training.logging_steps=1",
            "training.use_cpu=true",
            "training.resume_from_checkpoint=true",
        )
        return [sys.executable, "-m", *(torchrun if self.processes > 1 else []), "qwenvl_ft.train", *settings]

    @property
    def printed_to(self) -> Path:
        return self.output.parent / f"{self.output.name}.{self.starts}.out"

    @property
    def printed(self) -> str:
        return self.printed_to.read_text(errors="replace")

    @property
    def code(self) -> int | None:
        """Exit code of this start; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    @property
    def logged(self) -> int:
        """Number of lines that all starts have logged."""
        log = self.output / "trainer_log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.code is not None

    def wait_for_a_step(self) -> None:
        """Wait until this start has logged a step, or has ended."""
        before, end = self.logged, time.monotonic() + LONGEST
        while self.logged == before and self.code is None:
            assert time.monotonic() < end, f"no step within {LONGEST} s:\n{self.printed[-2000:]}"
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            AssertionError: the start hangs; its processes are killed.
        """
        if not self.ends_within(LONGEST):
            self.kill_all()
            raise AssertionError(f"hung for {LONGEST} s:\n{self.printed[-3000:]}")

    def ranks(self) -> list[int]:
        """Return the processes that train: torchrun's children, or the one that was started."""
        assert self.process is not None
        if self.processes == 1:
            return [self.process.pid]
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def kill_all(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter_model.safetensors")


# -- faults: each leaves a run that has ended --------------------------------------------------------------------------


def kill_one(run: Run, draw: random.Random) -> None:
    ranks = run.ranks()
    with suppress(ProcessLookupError, IndexError):  # it ended by itself just now
        os.kill(draw.choice(ranks), signal.SIGKILL)
    run.finish()


def kill_all(run: Run, draw: random.Random) -> None:
    run.kill_all()


def terminate(run: Run, draw: random.Random) -> None:
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    run.finish()


def cut_newest(run: Run, draw: random.Random) -> None:
    """Kill all processes, then cut a file of the newest checkpoint short, as a crash of the machine may."""
    run.kill_all()
    folders = sorted(run.output.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    files = sorted(path for path in folders[-1].rglob("*") if path.is_file() and path.stat().st_size) if folders else []
    if files:
        file = draw.choice(files)
        os.truncate(file, draw.randrange(file.stat().st_size))


def fill_disk(run: Run, draw: random.Random) -> None:
    """Fill the disk under the run until it ends, then make room again."""
    filler = run.output.parent / "filler"
    with filler.open("wb") as file:
        chunk = b"\0" * (1 << 20)
        try:
            while run.code is None:
                file.write(chunk)
                file.flush()
        except OSError:
            chunk = b"\0"
        while run.code is None:  # also the room that deleted checkpoints leave
            try:
                os.write(file.fileno(), b"\0" * 4096)
            except OSError:
                time.sleep(0.002)
            assert shutil.disk_usage(run.output).total <= 2 * DISK, "this is not the small disk"
    run.finish()
    filler.unlink()
    assert "Traceback" not in run.printed.split(LAUNCHED)[0] or run.code == 0, run.printed[-3000:]


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "SIGKILL of one process": kill_one,
    "SIGKILL of all": kill_all,
    "SIGTERM": terminate,
    "newest checkpoint cut": cut_newest,
    "disk full": fill_disk,
}


# -- one seed ----------------------------------------------------------------------------------------------------------


@dataclass
class Quiet:
    """The run that nothing disturbs, for a number of processes."""

    weights: dict[str, torch.Tensor]
    seconds: float
    """From its first step to its end."""


def quiet_run(model: Path, data: Path, folder: Path, processes: int) -> Quiet:
    run = Run(model, data, folder / f"quiet-{processes}", processes)
    run.start()
    run.wait_for_a_step()
    begin = time.monotonic()
    run.finish()
    assert run.code == 0, run.printed[-3000:]
    return Quiet(run.weights(), time.monotonic() - begin)


@dataclass
class Row:
    """What happened to a seed's run."""

    seed: int
    processes: int
    starts: int
    faults: list[str]
    wrong: str
    """Why the run failed; empty if its weights have the bits of the quiet run."""

    def cells(self) -> str:
        faults = "; ".join(self.faults) or "none before its end"
        return f"| {self.seed} | {self.processes} | {faults} | {self.starts} | {self.wrong or 'bit-equal'} |"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of `DISK` bytes at a folder; yields False where this process may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disturbed_run(seed: int, model: Path, data: Path, folder: Path, quiet: Quiet, processes: int) -> Row:
    """Run a seed's faults one after the other, then start the run until it ends by itself."""
    draw = random.Random(seed)
    with small_disk(folder / f"seed-{seed}") as mounted:
        run = Run(model, data, folder / f"seed-{seed}" / "run", processes)
        row = Row(seed, processes, 0, [], "")
        possible = [name for name in FAULTS if mounted or name != "disk full"]
        try:
            for name in draw.sample(possible, draw.randint(1, 3)):
                run.start()
                run.wait_for_a_step()
                if run.ends_within(draw.random() * quiet.seconds):
                    break
                step = run.logged
                FAULTS[name](run, draw)
                row.faults.append(f"{name} ({step})")
            while (run.process is None or run.code != 0) and run.starts < MOST_STARTS:
                run.start()
                run.finish()
            row.wrong = differs(run, quiet)
        except AssertionError as error:
            row.wrong = " ".join(str(error).split())[-300:]
            if run.process is not None and run.code is None:
                run.kill_all()
        row.starts = run.starts
    return row


def differs(run: Run, quiet: Quiet) -> str:
    """Return how a run differs from the quiet one; empty if its weights have the same bits."""
    if run.code != 0:
        return f"ended with {run.code}: {' '.join(run.printed.split())[-300:]}"
    weights = run.weights()
    if weights.keys() != quiet.weights.keys():
        return "other weights"
    worst = max(float((weights[name] - value).abs().max()) for name, value in quiet.weights.items())
    return (
        "" if all(torch.equal(weights[name], value) for name, value in quiet.weights.items()) else f"off by {worst:.1e}"
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    equal = sum(not row.wrong for row in rows)
    head = f"{equal} of {len(rows)} runs ended with the weights of the quiet run, bit by bit."
    return "\n".join([head, "", HEADER, "| --- " * HEADER.count(" | ") + "| --- |", *(row.cells() for row in rows)])


def main() -> int:
    from qwenvl_ft.model.tiny import make_tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--minutes", type=float, default=40, help="no seed begins after this time")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{PAGE.name}")
    arguments = parser.parse_args()
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="qwenvl-ft-kill-") as name:
        folder = Path(name)
        model, data = make_tiny(folder / "tiny"), write_questions(folder, 10, answer="number")
        quiet = {processes: quiet_run(model, data, folder, processes) for processes in (1, 2)}
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            if time.monotonic() - begin > 60 * arguments.minutes:
                break
            processes = 1 + seed % 2
            rows.append(disturbed_run(seed, model, data, folder, quiet[processes], processes))
            print(rows[-1].cells(), flush=True)
    print(f"\n{table(rows).splitlines()[0]}")
    if arguments.write:
        write_between(PAGE, BEGIN, END, table(rows))
    return int(len(rows) < arguments.seeds or any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
