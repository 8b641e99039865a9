"""Checkpoints of one small tensor, with every file that a run needs to go on."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qwenvl_ft.checkpoint.manifest import begin, seal


def write(folder, *, optimizer=True, sealed=True, random_state="rng_state.pth"):
    """Write the files of a checkpoint, and its manifest if ``sealed``."""
    if sealed:
        begin(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.arange(64.0)}, folder / "model.safetensors")
    if optimizer:
        for name in ("optimizer.pt", "scheduler.pt", random_state):
            torch.save({"state": torch.arange(64.0)}, folder / name)
    (folder / "plan.json").write_text('{"samples": 4}')
    (folder / "recipe.yaml").write_text("model: {}\n")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    if sealed:
        seal(folder)
    return folder


@pytest.fixture
def make(tmp_path):
    """Return a function that writes ``checkpoint-STEP`` into a folder of its own."""
    return lambda step, **options: write(tmp_path / "run" / f"checkpoint-{step}", **options)
