"""GPU day: run all that a GPU has to show within a budget of minutes, and write it down after every step.

    make gpu-wheels                                  where there is a network
    make gpu                                         where there is a GPU
    make gpu GPU_ARGS="--budget 9m --out DIR"        a slice: goes on with what DIR/gpu.json does not have yet
    make gpu GPU_ARGS="--rehearse --out DIR"         tiny sizes, on a CPU
    make gpu-report FILE=DIR/gpu.json                its tables into the documents

A step is a process of its own with a time limit. One that fails, hangs or runs out of memory is a row with its reason;
one that would not fit into the rest of the budget is a row too, and is tried by the next slice. Only the standard
library is needed here, and no setting of the GPU is touched.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from steps import ROOT, Step, steps  # noqa: E402
from wheels import FOLDER, unpack_missing  # noqa: E402

SCHEMA = 1
RESERVE = 5
"""Seconds of the budget that are kept for writing."""
TAIL = 40
"""Lines of the output of a step that is not ok, kept with it."""


def seconds(text: str) -> float:
    """``90``, ``90s``, ``9m``: seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([sm]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 9m, 90s or 90")
    return float(found.group(1)) * (60 if found.group(2) == "m" else 1)


def run_day(todo: list[Step], told: dict, file: Path, env: dict[str, str], budget: float, again: bool = False) -> dict:
    """Run the steps that have no result yet, in order, while the budget lasts.

    Args:
        told: results so far; a step that was left out for want of time is tried again, others if ``again``.
        file: written after every step.
        env: of the steps.
    """
    end = time.monotonic() + budget
    entries = {entry["step"]: entry for entry in told["steps"]}
    for step in todo:
        before = entries.get(step.name)
        if before and not before.get("no_time") and not (again and before["status"] != "ok") and step.name != "machine":
            continue
        left = end - time.monotonic() - RESERVE
        if left < min(step.usual, step.limit):
            reason = f"{max(0, left):.0f} s left of the budget, it takes about {step.usual:.0f}"
            entry = {"step": step.name, "status": "skipped", "reason": reason, "no_time": True}
        else:
            entry = run_step(step, env, min(step.limit, left))
        if step.name == "machine" and entry["status"] == "ok":
            told["machines"] = [*told["machines"], entry["figures"]]
        entry["machine"] = len(told["machines"]) - 1
        entries[step.name] = entry
        told["steps"] = list(entries.values())
        write(told, file)
        print(
            f"{entry['status']:>8}  {entry.get('seconds', 0):6.1f} s  {step.name}  {entry['reason']}"[:300], flush=True
        )
    return told


def run_step(step: Step, env: dict[str, str], limit: float) -> dict:
    """Run one command; whatever happens is a row."""
    begin = time.monotonic()
    own = env | {"CUDA_VISIBLE_DEVICES": ""} if step.hide_gpu else env
    code, output = run(step.command, own, limit)
    try:
        status, reason, figures = step.read(code, output)
    except Exception as error:
        status, reason, figures = "failed", f"its answer cannot be read: {type(error).__name__}: {error}", {}
    entry = {
        "step": step.name,
        "status": status,
        "reason": reason,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": round(limit),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "figures": figures,
    }
    if status == "failed":
        entry["tail"] = output.splitlines()[-TAIL:]
        entry["no_time"] = code is None and limit < step.limit
    return entry


def run(command: list[str], env: dict[str, str], limit: float) -> tuple[int | None, str]:
    """A command in a session of its own, ended with all its children at the limit: exit code or None, and output."""
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "output"
        with kept.open("wb") as stream:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return 127, str(error)
            code: int | None = None
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                end_all(process)
        return code, kept.read_text(encoding="utf-8", errors="replace")


def end_all(process: subprocess.Popen) -> None:
    """End a command and what it left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def write(told: dict, file: Path) -> None:
    """Replace the file in one go, so that a cut does not leave half of it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def read(file: Path | None, rehearse: bool) -> dict:
    """Results of earlier slices, or none yet."""
    if file is None or not file.exists():
        return {"schema": SCHEMA, "rehearsal": rehearse, "commit": commit(), "machines": [], "steps": []}
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["schema"] != SCHEMA or told["rehearsal"] != rehearse:
        raise SystemExit(f"error: {file} is of another kind (schema {told['schema']}, rehearsal {told['rehearsal']})")
    return told


def commit() -> str:
    """What is run; empty outside of a clone."""
    words = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def environment(wheels: Path, site: Path) -> dict[str, str]:
    """The variables of the steps: this clone and the missing packages on the path, nothing from a network."""
    missing = unpack_missing(wheels, site)
    print(f"taken from {wheels}: {', '.join(missing) or 'nothing'}", flush=True)
    path = os.pathsep.join([str(ROOT), str(site)])
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run all that a GPU has to show.")
    parser.add_argument("--budget", type=seconds, default=seconds("25m"), help="as 9m; 25m")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", help="folder of gpu.json; .gpu")
    parser.add_argument("--resume", type=Path, help="results of an earlier slice, if they are not in --out")
    parser.add_argument("--wheels", type=Path, default=FOLDER, help=".gpu/wheels")
    parser.add_argument("--site", type=Path, default=ROOT / ".gpu" / "site", help="where they are unpacked")
    parser.add_argument("--only", default="", help="steps whose name matches this pattern")
    parser.add_argument("--again", action="store_true", help="run failed steps again")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    parser.add_argument("--list", action="store_true", help="name the steps and leave")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    file = words.out / "gpu.json"
    with TemporaryDirectory() as work:
        todo = [step for step in steps(Path(work), rehearse=words.rehearse) if re.search(words.only, step.name)]
        if words.list:
            print("\n".join(f"{step.limit:5.0f} s  {step.name}" for step in todo))
            return 0
        told = read(file if file.exists() else words.resume, words.rehearse)
        env = environment(words.wheels, words.site)
        told = run_day(todo, told, file, env, words.budget, words.again)
    counts = {
        status: sum(entry["status"] == status for entry in told["steps"]) for status in ("ok", "failed", "skipped")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "in", file)
    return 0  # a failed row is a result too: a plain Trainer that runs out of memory, say


if __name__ == "__main__":
    sys.exit(main())
