"""Lists the steps of a GPU day, most important first. Each is a command with a time limit and a parser of its output.

Nothing here imports torch or the package, so that a broken environment becomes a row of the results and not a crash.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIRST_CELL = ("4b", "lora", 8192)
CELLS = (
    ("2b", "full", 8192),
    ("8b", "lora", 8192),
    ("4b", "lora", 16384),
    ("4b", "lora", 4096),
    ("2b", "full", 16384),
    ("2b", "full", 4096),
    ("8b", "lora", 16384),
    ("8b", "lora", 4096),
    ("2b", "lora", 8192),
    ("2b", "lora", 16384),
    ("2b", "lora", 4096),
    ("4b", "full", 8192),
    ("4b", "full", 16384),
    ("4b", "full", 4096),
    ("8b", "full", 8192),
    ("8b", "full", 16384),
    ("8b", "full", 4096),
)
REHEARSED_CELLS = (("tiny", "lora", 512), ("tiny", "full", 256))
UNKNOWN = "unknown command 'prove'"

Answer = tuple[str, str, dict]
"""Status (ok, failed, skipped), the reason if it is not ok, and figures."""


@dataclass(frozen=True)
class Step:
    """One command of a GPU day."""

    name: str
    command: list[str]
    limit: float
    """Seconds after which it is killed."""
    usual: float
    """Estimated seconds; with less time left it is not started."""
    read: Callable[[int | None, str], Answer]
    """Parses exit code (None: killed at its limit) and full output into an answer."""
    hide_gpu: bool = False


def steps(work: Path, *, rehearse: bool) -> list[Step]:
    """Return all steps in order.

    Args:
        work: folder for files that steps write.
        rehearse: use tiny sizes, for a machine without a GPU.
    """
    python = sys.executable
    first, rest = (REHEARSED_CELLS[0], REHEARSED_CELLS[1:]) if rehearse else (FIRST_CELL, CELLS)
    listed = [Step("machine", [python, str(HERE / "machine.py")], 90, 10, read_json)]
    listed += [gpu_tests(file, work) for file in gpu_files()]
    listed.append(prove(work, "lora"))
    listed.append(cells(*first, rehearse=rehearse))
    listed.append(contract(work))
    listed.append(prove(work, "full"))
    more = "liger,unchecked" if rehearse else "compiled,liger,unchecked"  # compiling on a CPU takes minutes
    listed.append(cells(*first, rehearse=rehearse, layouts=more))
    listed += [cells(*cell, rehearse=rehearse) for cell in rest]
    return listed


def gpu_files() -> list[str]:
    """Return the test files that contain tests marked gpu, those of this folder first."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    names = sorted(str(path.relative_to(ROOT)) for path in marked)
    return sorted(names, key=lambda name: not name.startswith("tests/gpu/"))


def gpu_tests(file: str, work: Path) -> Step:
    """Run the tests marked gpu of one file, in their own process because a failed kernel may crash it."""
    report = work / (file.replace("/", ".") + ".xml")
    return Step(
        f"gpu tests, {file}", pytest(report, "-m", "gpu", file), 180, 20, lambda code, _: read_xml(code, report)
    )


def contract(work: Path) -> Step:
    """Run the compatibility contract on the CPU, because its references are computed there."""
    report = work / "contract.xml"
    words = pytest(report, "-m", "not gpu and not soak", "-n", "8", "tests/upstream")
    return Step("contract", words, 300, 60, lambda code, _: read_xml(code, report), hide_gpu=True)


def pytest(report: Path, *words: str) -> list[str]:
    """Return a pytest command that writes a report, even if tests fail."""
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options, *words]


def prove(work: Path, tuner: str) -> Step:
    """Create a tiny checkpoint and run `qwenvl-ft prove` on it."""
    folder = work / "tiny"
    main = f'"{sys.executable}" -m qwenvl_ft.cli.main'
    script = f'{main} tiny "{folder}" >/dev/null && {main} prove --model "{folder}" --tuner {tuner} --json'
    return Step(f"prove, {tuner}", ["bash", "-c", script], 240, 45, read_prove)


def cells(size: str, train_type: str, row: int, *, rehearse: bool, layouts: str = "packed,padded,plain") -> Step:
    """Benchmark one size, method and row length in several layouts."""
    name = f"bench, {size} {train_type} {row}" + ("" if "packed" in layouts else f", {layouts}")
    words = ["--size", size, "--train-type", train_type, "--row-length", str(row), "--layouts", layouts]
    words += ["--steps", "1", "--warmup", "1"] if rehearse else []
    return Step(name, [sys.executable, str(HERE / "cells.py"), *words], 240, 40, read_rows)


def read_json(code: int | None, output: str) -> Answer:
    """Parse the last JSON line of the output."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if code == 0 and lines:
        return "ok", "", json.loads(lines[-1])
    return "failed", ended(code, output), {}


def read_prove(code: int | None, output: str) -> Answer:
    """Parse the object of checks; exit code 1 means that one failed. Older commits do not have the command."""
    if code == 2 and UNKNOWN in output:
        return "skipped", "not there", {}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    checks = json.loads(lines[-1]) if lines else {}
    return ("ok", "", checks) if code == 0 and checks else ("failed", ended(code, output), checks)


def read_rows(code: int | None, output: str) -> Answer:
    """Parse lines ``ROW {json}``; rows measured before a crash count."""
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW {")]
    bad = [f"{row['layout']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    if code != 0:
        return "failed", ended(code, output), {"rows": rows}
    if rows and all(row["status"] == "skipped" for row in rows):
        return "skipped", rows[0]["reason"], {"rows": rows}
    return ("failed" if bad or not rows else "ok"), "; ".join(bad), {"rows": rows}


def read_xml(code: int | None, report: Path) -> Answer:
    """Count tests by outcome, and list failed and skipped ones with their reason."""
    if not report.exists():
        return "failed", f"no report of pytest; {ended(code, '')}", {}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    named: dict[str, list[str]] = {"failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        notes = [(note.tag, note.get("message") or "") for note in case if note.tag in ("failure", "error", "skipped")]
        kind = "passed" if not notes else "skipped" if notes[0][0] == "skipped" else "failed"
        counts[kind] += 1
        if notes:
            named[kind].append(f"{case.get('name')}: {' '.join(notes[0][1].split())[:300]}")
    figures = counts | {"failures": named["failed"], "skips": named["skipped"]}
    if code not in (0, 5) or counts["failed"]:
        return "failed", f"{counts['failed']} failed; {ended(code, '')}", figures
    if not counts["passed"]:
        return "skipped", (named["skipped"] or ["no test"])[0], figures
    return "ok", "", figures


def ended(code: int | None, output: str) -> str:
    """Describe how a command ended, with its last line of output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    if "OutOfMemoryError" in output:
        last = f": out of memory{last}"
    return ("stopped at its time limit" if code is None else f"exit code {code}") + last
