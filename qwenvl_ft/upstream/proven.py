"""Which versions of the libraries below the contract of tests/upstream was run with, and how it went.

`make upstream` writes proven.json beside this file and docs/compatibility.md from it. Nothing is borrowed here.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
"""The libraries whose behaviour the contract tests."""
RECORD = Path(__file__).with_name("proven.json")


@cache
def runs() -> dict[str, dict[str, Any]]:
    """Name of an environment -> its last run: python, versions, date, passed, failed, skipped, fallbacks, fault."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def held(run: dict[str, Any]) -> bool:
    """Whether the contract was run in an environment, and nothing in it failed."""
    return bool(run["passed"]) and not run["failed"] and not run["fault"]


def result(name: str) -> str:
    """What came of an environment's run, as ``61 passed, 2 skipped``."""
    run = runs()[name]
    counts = [f"{run[what]} {what}" for what in ("failed", "passed", "skipped") if run[what]]
    return run["fault"] or ", ".join(counts)


def here() -> dict[str, str]:
    """The installed versions of PACKAGES, without what a build adds (``2.14.0+cu130`` is ``2.14.0``)."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def proven(package: str) -> list[str]:
    """The versions of a package that the contract held with, oldest first."""
    return sorted({run["versions"][package] for run in runs().values() if held(run)}, key=_order)


def unproven() -> dict[str, list[str]]:
    """Installed packages whose very version no run had -> the nearest older and newer versions that one had."""
    result = {}
    for name, installed in here().items():
        known = proven(name)
        if installed not in known:
            older = [entry for entry in known if _order(entry) < _order(installed)]
            newer = [entry for entry in known if _order(entry) > _order(installed)]
            result[name] = older[-1:] + newer[:1]
    return result


def unproven_line() -> str:
    """What a training run says of versions that the contract was not run with; empty where it was run with each."""
    installed = here()
    parts = [
        f"{name} {installed[name]}" + (f" (nearest: {', '.join(nearest)})" if nearest else "")
        for name, nearest in unproven().items()
    ]
    if parts:
        return f"our tests were not run with {'; '.join(parts)}: `qwenvl-ft prove --model DIR` checks them"
    if not any(run["versions"] == here() for run in runs().values() if held(run)):
        return "our tests were run with each of these versions, but not together: `qwenvl-ft prove --model DIR` checks"
    return ""


def same_versions() -> list[str]:
    """The environments whose runs had every version that is installed here, Python's first two numbers included."""
    python = platform.python_version_tuple()[:2]
    return [
        name
        for name, run in runs().items()
        if run["versions"] == here() and tuple(run["python"].split(".")[:2]) == python
    ]


def _order(text: str) -> tuple[int, ...]:
    """A version as numbers that sort; a pre-release sorts as its release."""
    numbers = []
    for part in text.split("."):
        digits = "".join(character for character in part.partition("rc")[0] if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
