"""Writes docs/compatibility.md from the results of `make upstream`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = """\
# Compatibility

<!-- by make upstream -->

This page lists the versions of other libraries that were tested together. `qwenvl-ft doctor` shows which of the
versions on your machine are among them.

The lower bounds in `setup.cfg` are the oldest versions that pass the contract tests in `tests/upstream`. These train
tiny models and test, with the installed versions, every upstream internal that this package relies on and every promise
of the README. These environments were tested:

"""
TAIL = """
`make upstream` builds the environments and writes this page; `make upstream ENVS="oldest newest"` runs some of them
again. A training run with other versions prints one line about them, and `qwenvl-ft prove` checks the promises on your
own model and versions.
"""


def write_page(path: Path, record: dict[str, dict[str, Any]], reasons: dict[str, str]) -> None:
    """Write the page.

    Args:
        record: name of an environment -> its last run, in the order of the page.
        reasons: name of an environment -> what it represents.
    """
    path.write_text(HEAD + table(record, reasons) + gaps(record) + TAIL, encoding="utf-8")


def table(record: dict[str, dict[str, Any]], reasons: dict[str, str]) -> str:
    """Return the Markdown table, one row per environment."""
    packages = list(dict.fromkeys(package for run in record.values() for package in run["versions"]))
    heads = ["environment", "Python", *packages, "date", "contract tests"]
    rows = [heads, ["---"] * len(heads)]
    for name, run in record.items():
        versions = [run["versions"].get(package, "") for package in packages]
        rows.append([f"{name}: {reasons[name]}", run["python"], *versions, run["date"], result(run)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def result(run: dict[str, Any]) -> str:
    """Return a run's counts of passed, failed and skipped tests, or the reason why it did not run."""
    if run["fault"]:
        return f"not run: {run['fault']}".replace("|", "\\|")
    failed = f"**{run['failed']} failed**, " if run["failed"] else ""
    skipped = f", {run['skipped']} skipped" if run["skipped"] else ""
    return f"{failed}{run['passed']} passed{skipped}"


def gaps(record: dict[str, dict[str, Any]]) -> str:
    """Return the section that lists failures and slower fallbacks by environment."""
    lines = []
    for name, run in record.items():
        lines += [f"- {name}: `{failure}` fails" for failure in run["failures"]]
        lines += [f"- {name}: {fallback}" for fallback in run["fallbacks"]]
    body = "\n".join(lines) if lines else "Nothing."
    return f"\n## What is slower or missing, by environment\n\n{body}\n"
