"""requirements.lock: exact, complete, and free of places to fetch from."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"


def locked(python):
    """Package -> its version in the lock, for this Python on Linux."""
    outside = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    entries = [Requirement(line) for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    here = [entry for entry in entries if entry.marker is None or entry.marker.evaluate(outside)]
    assert all(re.fullmatch(r"==[^*,]+", str(entry.specifier)) for entry in here), "a version is not exact"
    names = [canonicalize_name(entry.name) for entry in here]
    assert len(names) == len(set(names)), "a package is there twice"
    return {name: str(entry.specifier)[2:] for name, entry in zip(names, here, strict=True)}


def asked():
    """What setup.cfg asks for, the dev extra and what it takes in included."""
    config = configparser.ConfigParser(interpolation=configparser.BasicInterpolation())
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = config["options"]["install_requires"] + extras["dev"]
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_a_version_that_fits_for_all_that_setup_cfg_asks_for(python):
    have = locked(python)
    requirements = asked()
    assert {"torch", "pytest", "av", "scikit-learn"} <= {entry.name for entry in requirements}, "vacuous"
    for entry in requirements:
        version = have.get(canonicalize_name(entry.name))
        assert version is not None, f"{entry.name} is not in the lock: make lock"
        assert entry.specifier.contains(version, prereleases=True), f"{entry} and {version} in the lock: make lock"


def test_the_lock_names_no_place_to_fetch_from():
    assert "://" not in LOCK.read_text()
    assert not re.search(r"^-", LOCK.read_text(), flags=re.MULTILINE)
