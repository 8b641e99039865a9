"""What a GPU day does, most important first: each step a command of its own with its limit and how to read its answer.

Nothing here imports torch or the package, so that a broken environment is a row of the results and no crash.
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
"""Status (ok, failed, skipped), the reason where it is not ok, and figures."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: list[str]
    limit: float
    """Seconds after which it is stopped."""
    usual: float
    """Seconds that it is guessed to take; with less left it is not begun."""
    read: Callable[[int | None, str], Answer]
    """Exit code (None: stopped at its limit) and all output -> answer."""
    hide_gpu: bool = False


def steps(work: Path, *, rehearse: bool) -> list[Step]:
    """All steps in their order.

    Args:
        work: a folder for what steps write.
        rehearse: tiny sizes, for a machine without a GPU.
    """
    python = sys.executable
    first, rest = (REHEARSED_CELLS[0], REHEARSED_CELLS[1:]) if rehearse else (FIRST_CELL, CELLS)
    told = [Step("machine", [python, str(HERE / "machine.py")], 90, 10, read_json)]
    told += [gpu_tests(file, work) for file in gpu_files()]
    told.append(prove(work, "lora"))
    told.append(cells(*first, rehearse=rehearse))
    told.append(contract(work))
    told.append(prove(work, "full"))
    more = "liger,unchecked" if rehearse else "compiled,liger,unchecked"  # compiling for a CPU takes minutes
    told.append(cells(*first, rehearse=rehearse, layouts=more))
    told += [cells(*cell, rehearse=rehearse) for cell in rest]
    return told


def gpu_files() -> list[str]:
    """Test files with tests that are marked gpu, those of this folder first."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    names = sorted(str(path.relative_to(ROOT)) for path in marked)
    return sorted(names, key=lambda name: not name.startswith("tests/gpu/"))


def gpu_tests(file: str, work: Path) -> Step:
    """The tests marked gpu of one file: in a process of their own, which a failed kernel may take with it."""
    report = work / (file.replace("/", ".") + ".xml")
    return Step(
        f"gpu tests, {file}", pytest(report, "-m", "gpu", file), 180, 20, lambda code, _: read_xml(code, report)
    )


def contract(work: Path) -> Step:
    """The contract, on the CPU of the machine, because its references are computed there."""
    report = work / "contract.xml"
    words = pytest(report, "-m", "not gpu", "-n", "8", "tests/upstream")
    return Step("contract", words, 300, 60, lambda code, _: read_xml(code, report), hide_gpu=True)


def pytest(report: Path, *words: str) -> list[str]:
    """pytest with a report that is read even if single tests fail."""
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options, *words]


def prove(work: Path, tuner: str) -> Step:
    """`qwenvl-ft prove` on a tiny checkpoint, which is made first."""
    folder = work / "tiny"
    main = f'"{sys.executable}" -m qwenvl_ft.cli.main'
    script = f'{main} tiny "{folder}" >/dev/null && {main} prove --model "{folder}" --tuner {tuner} --json'
    return Step(f"prove, {tuner}", ["bash", "-c", script], 240, 45, read_prove)


def cells(size: str, train_type: str, row: int, *, rehearse: bool, layouts: str = "packed,padded,plain") -> Step:
    """Bench one size, way of training and row length in several layouts."""
    name = f"bench, {size} {train_type} {row}" + ("" if "packed" in layouts else f", {layouts}")
    words = ["--size", size, "--train-type", train_type, "--row-length", str(row), "--layouts", layouts]
    words += ["--steps", "1", "--warmup", "1"] if rehearse else []
    return Step(name, [sys.executable, str(HERE / "cells.py"), *words], 240, 40, read_rows)


def read_json(code: int | None, output: str) -> Answer:
    """The last line of the output is the answer."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if code == 0 and lines:
        return "ok", "", json.loads(lines[-1])
    return "failed", ended(code, output), {}


def read_prove(code: int | None, output: str) -> Answer:
    """An object of checks; exit code 1 says that one does not hold. Older commits have no such command."""
    if code == 2 and UNKNOWN in output:
        return "skipped", "not there", {}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1]) if lines else {}
    return ("ok", "", told) if code == 0 and told else ("failed", ended(code, output), told)


def read_rows(code: int | None, output: str) -> Answer:
    """Lines ``ROW {json}``; what was measured before the process ended counts."""
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW {")]
    bad = [f"{row['layout']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    if code != 0:
        return "failed", ended(code, output), {"rows": rows}
    if rows and all(row["status"] == "skipped" for row in rows):
        return "skipped", rows[0]["reason"], {"rows": rows}
    return ("failed" if bad or not rows else "ok"), "; ".join(bad), {"rows": rows}


def read_xml(code: int | None, report: Path) -> Answer:
    """Tests by outcome, and those that failed or were skipped with their reason."""
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
    """How a command ended, and its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    if "OutOfMemoryError" in output:
        last = f": out of memory{last}"
    return ("stopped at its time limit" if code is None else f"exit code {code}") + last
