"""What a machine without a network lacks: fetch the wheels here, take those that are missing there.

    make gpu-wheels        (where there is a network)

A wheel is a zip file of a site-packages folder, so that no pip, no virtual environment and no build is needed on the
other machine: what is not installed there is unpacked into a folder that goes first on PYTHONPATH.
"""

import argparse
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu" / "wheels"
PYTHON = "3.12"
PLATFORMS = (28, 27, 24, 17, 12, 5)
"""manylinux_2_N that are accepted; pip takes each by its exact number."""
LIMIT_MB = 60
PACKAGES = (
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "omegaconf==2.4.0",
    "peft==0.21.2",
    "qwen-vl-utils==0.0.14",
    "xxhash==4.1.0",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "liger-kernel==0.8.5",
    "bitsandbytes==0.50.2",
)
"""Without their dependencies, which come with torch 2.11 and transformers 5.17, or stand here too. deepspeed has no
wheel; av is as large as all others but one, and only tests of video files need it."""


def fetch(folder: Path, packages: tuple[str, ...] = PACKAGES) -> str:
    """Download the wheels; what is there already is kept, what is not in the list goes.

    Raises:
        SystemExit: one has no wheel for such a machine, or all together are too large to carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in PLATFORMS] + [
        "--platform=manylinux2014_x86_64"
    ]
    words = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    target = [f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    if subprocess.run([sys.executable, *words, *target, "--dest", str(folder), *packages], check=False).returncode:
        raise SystemExit("error: a wheel was not found, see above; needs pip and a network")
    wanted = {normal(package.partition("==")[0]): package.partition("==")[2] for package in packages}
    for wheel in wheels(folder):
        if wanted.get(name_of(wheel)) != wheel.name.split("-")[1]:
            wheel.unlink()
    return check(folder)


def check(folder: Path) -> str:
    """How many wheels there are and how large they are. Raises SystemExit where they are too large to carry."""
    size = sum(wheel.stat().st_size for wheel in wheels(folder)) / 1e6
    told = f"{len(wheels(folder))} wheels, {size:.1f} MB in {folder}"
    if size > LIMIT_MB:
        raise SystemExit(f"error: {told}, more than {LIMIT_MB} MB. Remove the largest from PACKAGES.")
    return told


def unpack_missing(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels whose package is not installed into a folder for PYTHONPATH; the names of all that are there.

    Raises:
        ValueError: a wheel has files beside its packages that would be left out.
    """
    site.mkdir(parents=True, exist_ok=True)
    taken = []
    for wheel in wheels(folder):
        if installed(name_of(wheel)) and not _unpacked(wheel, site):
            continue
        if not _unpacked(wheel, site):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)
        taken.append(f"{name_of(wheel)} {wheel.name.split('-')[1]}")
    return taken


def _unpacked(wheel: Path, site: Path) -> bool:
    return (site / ("-".join(wheel.name.split("-")[:2]) + ".dist-info")).exists()


def wheels(folder: Path) -> list[Path]:
    """The wheels of a folder, by name."""
    return sorted(folder.glob("*.whl"))


def name_of(wheel: Path) -> str:
    """The package of a wheel."""
    return normal(wheel.name.split("-")[0])


def normal(name: str) -> str:
    """A package's name as it is compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def installed(name: str) -> bool:
    """Whether this Python has a package, whatever its version."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download the wheels that `make gpu` takes along.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    print(fetch(parser.parse_args().folder))
