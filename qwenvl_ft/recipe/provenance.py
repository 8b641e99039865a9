"""Package versions and git state, for the head of a saved recipe; also reads saved recipes."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("qwenvl-ft", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


def header() -> str:
    """Return the comment lines at the top of a saved recipe."""
    lines = [f"# {name} {_version(name)}" for name in PACKAGES]
    return "\n".join(
        [
            "# Resolved recipe; run it again with: accelerate launch -m qwenvl_ft.train recipe=PATH",
            *lines,
            f"# git {git_state()}",
            "",
        ]
    )


def git_state() -> str:
    """Return the commit of the current folder's git repository, marked if files have changed; ``none`` without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit} (with changes)" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return "none"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True, cwd=Path.cwd())
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def saved_recipe(folder: Path) -> dict[str, Any]:
    """Return the content of ``recipe.yaml`` in a run or checkpoint; empty if there is none.

    Nothing is checked, because the file may come from another release.
    """
    path = folder / "recipe.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
