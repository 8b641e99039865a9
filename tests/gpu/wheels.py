"""Download wheels for a GPU machine without a network, and unpack the missing ones there.

    make gpu-wheels        (on a machine with a network)

A wheel is a zip file of a site-packages folder, so the other machine needs no pip, virtual environment or build.
Packages that are not installed there are unpacked into a folder that comes first on PYTHONPATH.
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
"""Accepted values N of manylinux_2_N; pip needs each one listed."""
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
"""Downloaded without dependencies, which torch 2.11 and transformers 5.17 bring along or which are listed here too.
deepspeed has no wheel. av is as large as all but one of the others together, and only tests of video files need it."""


def fetch(folder: Path, packages: tuple[str, ...] = PACKAGES) -> str:
    """Download the wheels, keep existing ones, and delete those that are not listed.

    Raises:
        SystemExit: a package has no wheel for this platform, or the wheels together exceed `LIMIT_MB`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in PLATFORMS] + [
        "--platform=manylinux2014_x86_64"
    ]
    words = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    target = [f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    if subprocess.run([sys.executable, *words, *target, "--dest", str(folder), *packages], check=False).returncode:
        raise SystemExit("error: pip could not download a wheel, see above. This needs pip and a network.")
    wanted = {normal(package.partition("==")[0]): package.partition("==")[2] for package in packages}
    for wheel in wheels(folder):
        if wanted.get(name_of(wheel)) != wheel.name.split("-")[1]:
            wheel.unlink()
    return check(folder)


def check(folder: Path) -> str:
    """Return the number and size of the wheels. Raises SystemExit above `LIMIT_MB`."""
    size = sum(wheel.stat().st_size for wheel in wheels(folder)) / 1e6
    summary = f"{len(wheels(folder))} wheels, {size:.1f} MB in {folder}"
    if size > LIMIT_MB:
        raise SystemExit(f"error: {summary}, more than {LIMIT_MB} MB. Remove the largest from PACKAGES.")
    return summary


def unpack_missing(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that are not installed into a folder for PYTHONPATH.

    Returns:
        name and version of every package in the folder
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
    """Return the wheels of a folder, sorted by name."""
    return sorted(folder.glob("*.whl"))


def name_of(wheel: Path) -> str:
    """Return the package name of a wheel."""
    return normal(wheel.name.split("-")[0])


def normal(name: str) -> str:
    """Return a package name in normalised form."""
    return name.lower().replace("_", "-").replace(".", "-")


def installed(name: str) -> bool:
    """Return True if a package is installed, in any version."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download the wheels that `make gpu` needs.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    print(fetch(parser.parse_args().folder))
