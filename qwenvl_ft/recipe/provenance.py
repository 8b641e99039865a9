"""By which versions, and from which state of the working tree, a recipe was resolved."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("qwenvl-ft", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


def header() -> str:
    """Comment lines for the top of a saved recipe."""
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
    """Commit of the current folder's repository, with a mark if files were changed; none outside of one."""
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
    """What ``recipe.yaml`` of a run or checkpoint says, unchecked: it may be of another release. Empty without one."""
    path = folder / "recipe.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
