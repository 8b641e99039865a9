"""Run in two processes: save and damage checkpoints on a disk that the ranks share, and on two disks of their own."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import write

from qwenvl_ft.checkpoint import manifest
from qwenvl_ft.checkpoint.complete import resolve_resume, rotate
from qwenvl_ft.checkpoint.manifest import begin, gather, rank, read, seal

hashed = []
entry = manifest._entry
manifest._entry = lambda path, **options: hashed.append(path.name) or entry(path, **options)


def save(folder, step, *, own_disk):
    """Save a checkpoint of a shared part, written by the first rank of each disk, and a part of each rank."""
    checkpoint = folder / f"checkpoint-{step}"
    begin(checkpoint)
    if rank() == 0 or own_disk:
        write(checkpoint, sealed=False, random_state=f"rng_state_{rank()}.pth")
    gather()
    (checkpoint / f"rng_state_{rank()}.pth").write_bytes(bytes(100_000))
    hashed.clear()
    leads = seal(checkpoint)
    if leads:
        rotate(folder, 2)
    return leads, list(hashed)


def main(root):
    dist.init_process_group("gloo")
    results = {}
    for kind in ("shared", "own"):
        folder = root / (kind if kind == "shared" else f"own{rank()}")
        if kind == "own":
            os.environ["LOCAL_RANK"] = "0"
        saved = [save(folder, step, own_disk=kind == "own") for step in (2, 4, 6)]
        whole = resolve_resume(True, folder)
        if rank() == 1:
            shutil.copy(folder / "checkpoint-6" / "plan.json", folder / "checkpoint-6" / "rng_state_1.pth")
        gather()
        sizes = resolve_resume(True, folder)
        gather()
        if rank() == 1:
            (folder / "checkpoint-6" / "rng_state_1.pth").write_bytes(bytes(99_999) + b"1")
        gather()
        contents = resolve_resume(True, folder)
        results[kind] = {
            "leads": saved[-1][0],
            "hashed": saved[-1][1],
            "files": sorted(read(folder / "checkpoint-6")["files"]),
            "processes": read(folder / "checkpoint-6")["processes"],
            "left": sorted(path.name for path in folder.iterdir()),
            "taken": [found.folder.name for found in (whole, sizes, contents)],
            "passed": [line for found in (whole, sizes, contents) for line in found.passed],
        }
        gather()
    (root / f"rank{rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


main(Path(sys.argv[1]))
