"""Results of the contract tests (tests/upstream) with several versions of the libraries that this package uses.

`make upstream` writes proven.json beside this file, and docs/compatibility.md from it. Uses no internals of other
libraries.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
"""Libraries whose behaviour the contract covers."""
RECORD = Path(__file__).with_name("proven.json")


@cache
def runs() -> dict[str, dict[str, Any]]:
    """Return environment -> its last run: python, versions, date, passed, failed, skipped, fallbacks, fault."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def held(run: dict[str, Any]) -> bool:
    """Return True if the contract ran in an environment and nothing failed."""
    return bool(run["passed"]) and not run["failed"] and not run["fault"]


def result(name: str) -> str:
    """Return the result of an environment's run, such as ``61 passed, 2 skipped``."""
    run = runs()[name]
    counts = [f"{run[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if run[outcome]]
    return run["fault"] or ", ".join(counts)


def here() -> dict[str, str]:
    """Return the installed versions of PACKAGES, without build suffixes (``2.14.0+cu130`` is ``2.14.0``)."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def proven(package: str) -> list[str]:
    """Return the versions of a package with which the contract passed, oldest first."""
    return sorted({run["versions"][package] for run in runs().values() if held(run)}, key=_order)


def unproven() -> dict[str, list[str]]:
    """Return installed packages whose exact version was in no run -> the nearest older and newer versions in a run."""
    result = {}
    for name, installed in here().items():
        known = proven(name)
        if installed not in known:
            older = [entry for entry in known if _order(entry) < _order(installed)]
            newer = [entry for entry in known if _order(entry) > _order(installed)]
            result[name] = older[-1:] + newer[:1]
    return result


def unproven_line() -> str:
    """Return the line that a training run logs about untested versions or combinations; empty if there are none."""
    installed = here()
    parts = [
        f"{name} {installed[name]}" + (f" (nearest: {', '.join(nearest)})" if nearest else "")
        for name, nearest in unproven().items()
    ]
    if parts:
        return f"not tested: {'; '.join(parts)}. `qwenvl-ft prove --model DIR` checks them on your model"
    if not any(run["versions"] == here() for run in runs().values() if held(run)):
        return "these versions were tested, but not together; `qwenvl-ft prove --model DIR` checks them on your model"
    return ""


def same_versions() -> list[str]:
    """Return the environments whose runs had exactly the installed versions, including Python's first two numbers."""
    python = platform.python_version_tuple()[:2]
    return [
        name
        for name, run in runs().items()
        if run["versions"] == here() and tuple(run["python"].split(".")[:2]) == python
    ]


def _order(text: str) -> tuple[int, ...]:
    """Return a version as numbers to sort by; a pre-release sorts like its release."""
    numbers = []
    for part in text.split("."):
        digits = "".join(character for character in part.partition("rc")[0] if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
