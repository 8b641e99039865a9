"""``qwenvl-ft doctor``: reports packages, devices, attention and memory, and what keeps this machine from training."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import typer

GIB = 1024**3
SHARED_MEMORY = 1.0
"""Free space in /dev/shm, in GiB, below which dataloader workers may fail to pass on their batches."""


def doctor() -> None:
    """Print packages, devices, attention and memory. The exit code is 1 if something that training needs is missing."""
    faults: list[str] = []
    for title, report in REPORTS.items():
        typer.echo(f"{title}")
        for line in report(faults):
            typer.echo(f"  {line}")
    typer.echo("\n".join(["", *(f"fault: {fault}" for fault in faults)]) if faults else "\nready to train")
    if faults:
        raise typer.Exit(1)


def machine(faults: list[str]) -> Iterator[str]:
    """Yield processor, memory, and the folders that dataloader workers need."""
    from qwenvl_ft.data.plan.workers import require_short_tempdir
    from qwenvl_ft.errors import RecipeError

    yield f"Python {platform.python_version()}, {platform.platform()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"
    if Path("/dev/shm").is_dir():
        room = shutil.disk_usage("/dev/shm").free / GIB
        yield f"/dev/shm: {room:.1f} GiB free"
        if room < SHARED_MEMORY:
            faults.append(
                f"/dev/shm has {room:.2f} GiB free for the dataloader workers' batches; in Docker: --shm-size=8g"
            )
    yield f"TMPDIR: {tempfile.gettempdir()}, {shutil.disk_usage(tempfile.gettempdir()).free / GIB:.0f} GiB free"
    try:
        require_short_tempdir()
    except RecipeError as error:
        faults.append(str(error))


def packages(faults: list[str]) -> Iterator[str]:
    """Yield the installed version of each required and optional package, with the wanted one if it differs."""
    from packaging.requirements import Requirement

    for text in requires("qwenvl-ft") or []:
        needed = Requirement(text)
        extra = str(needed.marker or "").partition("==")[2].strip(" '\"")
        if extra in ("dev", "demo", "contract"):
            continue
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            here = ""
        fits = bool(here) and needed.specifier.contains(here, prereleases=True)
        wanted = "" if fits or not here else f", wanted {needed.specifier}"
        yield f"{needed.name} {here or 'absent'}{wanted}" + (f" (extra {extra})" if extra else "")
        if not extra and not fits:
            state = f"{here} is installed" if here else "it is not installed"
            faults.append(f"{needed.name}{needed.specifier} is required, but {state}. Run pip install -e .")


def compatibility(faults: list[str]) -> Iterator[str]:
    """Yield which of the installed versions were tested, and what is slower or missing with them."""
    from qwenvl_ft.upstream import probe, proven

    installed, other = proven.here(), proven.unproven()
    for name in proven.PACKAGES:
        tested = ", ".join(proven.proven(name)) or "none"
        note = f"not tested; tested versions: {tested}" if name in other else "tested"
        yield f"{name} {installed[name]}: {note}"
    if same := proven.same_versions():
        results = "; ".join(f"{name} on {proven.runs()[name]['date']}: {proven.result(name)}" for name in same)
        yield f"all of them together, with this Python: {results}"
    else:
        yield "all of them together, with this Python: not tested; `qwenvl-ft prove` checks them on your model"
    yield from probe.fallbacks()


def devices(faults: list[str]) -> Iterator[str]:
    """Yield the GPUs that torch can use."""
    import torch

    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"
    yield f"{built}; {torch.cuda.device_count()} usable GPUs"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bfloat16"
        able = f"capability {device.major}.{device.minor}{bf16}"
        yield f"{index}: {device.name}, {device.total_memory / GIB:.0f} GiB, {able}"
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        faults.append(
            "nvidia-smi is installed, but torch sees no GPU: the driver is too old for torch's CUDA version, or "
            "CUDA_VISIBLE_DEVICES hides the GPUs"
        )


def attention(faults: list[str]) -> Iterator[str]:
    """Yield the implementation that ``model.attn_impl: auto`` selects, and why the others cannot be used."""
    from qwenvl_ft.model.choose_attention import FLASH, obstacle, resolve_attn_impl

    yield f"auto is {resolve_attn_impl('auto')} in 16 bits, {resolve_attn_impl('auto', 'float32')} in float32"
    yield from (f"{name}: {obstacle(name) or 'usable'}" for name in FLASH)


REPORTS: dict[str, Callable[[list[str]], Iterator[Any]]] = {
    "machine": machine,
    "packages": packages,
    "tested versions": compatibility,
    "devices": devices,
    "attention": attention,
}
"""Heading -> function that yields the lines below it, and adds to ``faults`` what keeps this machine from training."""
