"""Which versions the package runs with: `make upstream` builds the environments of PLAN, and runs the contract in each.

    python tests/upstream/environments.py [--venvs FOLDER] [--jobs 2] [NAME ...]

Needs uv, which shares packages between environments by hard links; an environment that is there is used as it is.
Results go to qwenvl_ft/upstream/proven.json, where those of other environments are kept, and docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compatibility_page import write_page

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "qwenvl_ft/upstream/proven.json"
PAGE = ROOT / "docs/compatibility.md"
OLDEST = "lowest-direct"
READY = ".built"
"""File in an environment that was built to its end."""
TIMEOUT = 3600
"""Seconds that one environment's contract may take."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions to run the contract with; what is not pinned is the newest that fits."""

    why: str
    """What it stands for."""
    python: str
    pins: tuple[str, ...] = ()
    """Requirements beside those of setup.cfg."""
    day: str = ""
    """Only what had been published by then, as 2026-09-15; empty for today."""
    options: tuple[str, ...] = ()
    """More options of ``uv pip install``."""


PLAN = {
    "oldest": Environment(
        why="each lower bound of setup.cfg",
        python="3.11",
        options=("--resolution", OLDEST),
    ),
    "t5.12": Environment(
        why="June 2026, with the torch of vLLM 0.20 to 0.24",
        python="3.11",
        pins=("transformers==5.12.1", "torch==2.11.0"),
        day="2026-06-30",
    ),
    "t5.17": Environment(
        why="images of clusters, Python 3.12",
        python="3.12",
        pins=("transformers==5.17.0", "torch==2.11.0", "huggingface_hub<2"),
        day="2026-09-30",
    ),
    "t5.19": Environment(
        why="SGLang 0.5.23",
        python="3.12",
        pins=("transformers==5.19.0", "torch==2.14.1", "tokenizers==0.23.2"),
        day="2026-10-15",
    ),
    "swift": Environment(
        why="beside ms-swift 4.6",
        python="3.12",
        pins=("ms-swift==4.6.*", "torch==2.14.1"),
    ),
    "t5.21": Environment(
        why="October 2026",
        python="3.12",
        pins=("transformers==5.21.0", "torch==2.14.1"),
        day="2026-10-29",
    ),
    "t5.23": Environment(
        why="the version before the newest",
        python="3.11",
        pins=("transformers==5.23.0",),
    ),
    "newest": Environment(why="the newest of everything", python="3.11"),
    "newest-py313": Environment(why="the newest of everything, Python 3.13", python="3.13"),
    "prerelease": Environment(
        why="pre-releases, where there are any",
        python="3.13",
        options=("--prerelease", "allow"),
    ),
}
"""Name -> environment, from the oldest to the newest."""

VERSIONS = """
import json, platform
from qwenvl_ft.upstream import proven
print(json.dumps({"python": platform.python_version(), "versions": proven.here()}))
"""
FALLBACKS = """
import json
from qwenvl_ft.upstream import probe
print("\\n" + json.dumps(probe.fallbacks()))
"""


class Fault(Exception):
    """An environment that cannot be built or run; its row says why."""


def main() -> None:
    """Run the environments that are named, all by default; exit code 1 where the contract did not hold in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"environments: {', '.join(PLAN)}; default all")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".upstream", help="folder of the environments")
    parser.add_argument("--jobs", default="1", help="processes that share the tests of one environment")
    parser.add_argument("--build-only", action="store_true", help="make the environments and run nothing")
    parser.add_argument("--page-only", action="store_true", help="write docs/compatibility.md from what was run before")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(PLAN)):
        sys.exit(f"no environment {unknown[0]!r}. Known: {', '.join(PLAN)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    bad = []
    for name in [] if args.page_only else args.names or list(PLAN):
        if args.build_only:
            build(PLAN[name], args.venvs / name)
            continue
        record[name] = run(PLAN[name], args.venvs / name, args.jobs)
        save(record)
        print(f"{name}: {summary(record[name])}", flush=True)
        if record[name]["fault"] or record[name]["failed"]:
            bad.append(name)
    if args.page_only:
        save(record)
    if bad:
        sys.exit(f"the contract does not hold in: {', '.join(bad)}")


def save(record: dict[str, Any]) -> None:
    """Write the record in the order of PLAN, and the page that shows it."""
    ordered = {name: record[name] for name in PLAN if name in record}
    RECORD.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(PAGE, ordered, {name: entry.why for name, entry in PLAN.items()})


def summary(run: dict[str, Any]) -> str:
    """A run's result in a line."""
    if run["fault"]:
        return run["fault"]
    return f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped in {run['seconds']} s"


def run(environment: Environment, folder: Path, jobs: str) -> dict[str, Any]:
    """Build an environment, run the contract in it, and return what is to be kept of both."""
    result: dict[str, Any] = {"python": environment.python, "versions": {}, "date": str(datetime.date.today())}
    result |= {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0, "failures": [], "fallbacks": [], "fault": ""}
    try:
        build(environment, folder)
        result |= json.loads(in_environment(folder, "-c", VERSIONS).splitlines()[-1])
        result |= contract(folder, jobs)
        result["fallbacks"] = json.loads(in_environment(folder, "-c", FALLBACKS).splitlines()[-1])
    except Fault as fault:
        result["fault"] = str(fault)
    return result


def build(environment: Environment, folder: Path) -> None:
    """Make the environment where it is missing, and take what is new into one that is to have the newest.

    Raises:
        Fault: in uv's own words.
    """
    is_there = (folder / READY).exists()
    if is_there and (environment.day or OLDEST in environment.options):
        return
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("make upstream needs uv, which shares packages between environments: pip install uv")
    print(f"building {folder}", flush=True)
    if not is_there:
        call(uv, "venv", "--clear", "--python", interpreter(environment.python), str(folder))
    extra = ("--exclude-newer", environment.day) if environment.day else ("--upgrade",) if is_there else ()
    needed = ("-r", str(ROOT / "setup.cfg"), "--extra", "contract", *environment.pins)
    call(uv, "pip", "install", "--python", str(folder), *extra, *environment.options, *needed)
    (folder / READY).touch()


def interpreter(number: str) -> str:
    """A Python of this version that starts, pyenv's included; if there is none the number, for uv to fetch one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [shutil.which(f"python{number}"), *sorted(pyenv.glob(f"{number}.*/bin/python"))]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-V"], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    return number


def contract(folder: Path, jobs: str) -> dict[str, Any]:
    """Run tests/upstream; returns counts, seconds and the names of what failed."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        spread = ["-n", jobs] if int(jobs) > 1 else []
        command = [*spread, "-q", "-m", "not gpu and not soak", "-p", "no:cacheprovider", "tests/upstream"]
        command.append(f"--junitxml={report}")
        begin = time.monotonic()
        in_environment(folder, "-m", "pytest", *command, check=False, show=True)
        if not report.exists():
            raise Fault("pytest wrote no report")
        return count(report) | {"seconds": round(time.monotonic() - begin)}


def count(report: Path) -> dict[str, Any]:
    """Counts of a junit report; a test that errs counts as failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = sorted({_name(case) for case in cases if _has(case, "failure") or _has(case, "error")})
    skipped = sum(_has(case, "skipped") for case in cases)
    return {
        "passed": len({_name(case) for case in cases}) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
    }


def _has(case: ElementTree.Element, what: str) -> bool:
    return case.find(what) is not None


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"


def in_environment(folder: Path, *arguments: str, check: bool = True, show: bool = False) -> str:
    """Run the environment's Python on the package of this folder; returns what it printed."""
    outside = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return call(str(folder / "bin/python"), *arguments, check=check, show=show, **outside)


def call(*command: str, check: bool = True, show: bool = False, **outside: str) -> str:
    """Run a command in the project's folder; raises Fault with its last words where it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | outside,
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"took more than {TIMEOUT} s") from None
    if check and done.returncode:
        raise Fault(" ".join(last_words(done.stderr or "")))
    return done.stdout or ""


def last_words(text: str) -> Iterator[str]:
    """The last three lines that say something."""
    yield from [line.strip() for line in text.splitlines() if line.strip()][-3:]


if __name__ == "__main__":
    main()
