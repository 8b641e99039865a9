"""requirements.lock has exact versions, is complete, and names no package source."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"


def locked(python):
    """Map each package to its locked version, for a Python version on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    entries = [Requirement(line) for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    applicable = [entry for entry in entries if entry.marker is None or entry.marker.evaluate(environment)]
    assert all(re.fullmatch(r"==[^*,]+", str(entry.specifier)) for entry in applicable), "a version is not exact"
    names = [canonicalize_name(entry.name) for entry in applicable]
    assert len(names) == len(set(names)), "a package is listed twice"
    return {name: str(entry.specifier)[2:] for name, entry in zip(names, applicable, strict=True)}


def required():
    """Return the requirements in setup.cfg, including the dev extra."""
    config = configparser.ConfigParser(interpolation=configparser.BasicInterpolation())
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = config["options"]["install_requires"] + extras["dev"]
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_satisfies_every_requirement_of_setup_cfg(python):
    versions = locked(python)
    requirements = required()
    assert {"torch", "pytest", "av", "scikit-learn"} <= {entry.name for entry in requirements}, "vacuous"
    for entry in requirements:
        version = versions.get(canonicalize_name(entry.name))
        assert version is not None, f"{entry.name} is not in the lock: run make lock"
        assert entry.specifier.contains(version, prereleases=True), f"{entry}, but {version} is locked: run make lock"


def test_the_lock_names_no_package_source():
    assert "://" not in LOCK.read_text()
    assert not re.search(r"^-", LOCK.read_text(), flags=re.MULTILINE)
