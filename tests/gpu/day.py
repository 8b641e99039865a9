"""GPU day: run everything that needs a GPU within a budget of minutes, and save results after every step.

    make gpu-wheels                                  on a machine with a network
    make gpu                                         on a machine with a GPU
    make gpu GPU_ARGS="--budget 9m --out DIR"        a slice: runs what DIR/gpu.json lacks
    make gpu GPU_ARGS="--rehearse --out DIR"         tiny sizes, on a CPU
    make gpu-report FILE=DIR/gpu.json                write the tables into the documents

Each step is a process of its own with a time limit. A step that fails, hangs or runs out of memory becomes a row with
the reason. So does a step that does not fit into the remaining budget; the next slice runs it. This module only needs
the standard library and changes no setting of the GPU.
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
"""Seconds of the budget reserved for writing results."""
TAIL = 40
"""Last lines of output that are saved with a failed step."""


def seconds(text: str) -> float:
    """Parse ``90``, ``90s`` or ``9m`` into seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([sm]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 9m, 90s or 90")
    return float(found.group(1)) * (60 if found.group(2) == "m" else 1)


def run_day(
    todo: list[Step], results: dict, file: Path, env: dict[str, str], budget: float, again: bool = False
) -> dict:
    """Run the steps without a result, in order, within the budget.

    Args:
        results: results so far. A step that was skipped for lack of time runs again; failed ones only if ``again``.
        file: rewritten after every step.
        env: environment variables of the steps.
        budget: seconds.
    """
    end = time.monotonic() + budget
    entries = {entry["step"]: entry for entry in results["steps"]}
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
            results["machines"] = [*results["machines"], entry["figures"]]
        entry["machine"] = len(results["machines"]) - 1
        entries[step.name] = entry
        results["steps"] = list(entries.values())
        write(results, file)
        print(
            f"{entry['status']:>8}  {entry.get('seconds', 0):6.1f} s  {step.name}  {entry['reason']}"[:300], flush=True
        )
    return results


def run_step(step: Step, env: dict[str, str], limit: float) -> dict:
    """Run one command and return its row, whatever happens."""
    begin = time.monotonic()
    variables = env | {"CUDA_VISIBLE_DEVICES": ""} if step.hide_gpu else env
    code, output = run(step.command, variables, limit)
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
    """Run a command in its own session and kill it with all children at the limit.

    Returns:
        exit code (None if it was killed at the limit), and output
    """
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
    """Kill a command and every process that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def write(results: dict, file: Path) -> None:
    """Replace the file atomically, so that an interruption does not leave half of it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def read(file: Path | None, rehearse: bool) -> dict:
    """Read the results of earlier slices, or return empty ones."""
    if file is None or not file.exists():
        return {"schema": SCHEMA, "rehearsal": rehearse, "commit": commit(), "machines": [], "steps": []}
    results = json.loads(file.read_text(encoding="utf-8"))
    if results["schema"] != SCHEMA or results["rehearsal"] != rehearse:
        raise SystemExit(
            f"error: {file} does not match this run (schema {results['schema']}, rehearsal {results['rehearsal']})"
        )
    return results


def commit() -> str:
    """Return the git commit, or an empty string outside a clone."""
    words = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def environment(wheels: Path, site: Path) -> dict[str, str]:
    """Return the environment of the steps: this clone and the unpacked wheels on PYTHONPATH, no network."""
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
    parser = argparse.ArgumentParser(description="Run everything that needs a GPU.")
    parser.add_argument("--budget", type=seconds, default=seconds("25m"), help="time limit, such as 9m; default: 25m")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu", help="folder of gpu.json; default: .gpu")
    parser.add_argument("--resume", type=Path, help="results of an earlier slice, if not in --out")
    parser.add_argument("--wheels", type=Path, default=FOLDER, help="folder of wheels; default: .gpu/wheels")
    parser.add_argument(
        "--site", type=Path, default=ROOT / ".gpu" / "site", help="folder that wheels are unpacked into"
    )
    parser.add_argument("--only", default="", help="run only steps whose name matches this pattern")
    parser.add_argument("--again", action="store_true", help="run failed steps again")
    parser.add_argument("--rehearse", action="store_true", help="use tiny sizes, on a CPU")
    parser.add_argument("--list", action="store_true", help="list the steps and exit")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu.json"
    with TemporaryDirectory() as work:
        todo = [step for step in steps(Path(work), rehearse=args.rehearse) if re.search(args.only, step.name)]
        if args.list:
            print("\n".join(f"{step.limit:5.0f} s  {step.name}" for step in todo))
            return 0
        results = read(file if file.exists() else args.resume, args.rehearse)
        env = environment(args.wheels, args.site)
        results = run_day(todo, results, file, env, args.budget, args.again)
    counts = {
        status: sum(entry["status"] == status for entry in results["steps"]) for status in ("ok", "failed", "skipped")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "in", file)
    return 0  # a failed row is a result too, such as a plain Trainer that runs out of memory


if __name__ == "__main__":
    sys.exit(main())
