"""Helpers for several tests: pictures, records in memory, a trainer over them, changed weights."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.model.tiny import make_tiny

SHARED = Path(os.environ.get("QWENVL_FT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
"""Folder with the official cases and the released processor; tests that need it are skipped without it."""


KINDS = ("dense", "moe", "qwen3_5", "qwen3_5_moe")
"""Names of the tiny checkpoints: Qwen3-VL and Qwen3.5, each dense and as a mixture of experts."""

MOST_KINDS = [*KINDS[:3], pytest.param(KINDS[3], marks=pytest.mark.soak)]
"""``KINDS`` for tests of what the last kind has from the two before it."""


OLDER_KINDS = ("qwen2_vl", "qwen2_5_vl")
"""Tiny checkpoints of older families: their own patches, template and vision tower."""


FOR_4_BITS = {"shared_expert_intermediate_size": 64}
"""A multiple of 64, as in the released models: bitsandbytes' 4-bit kernel for CPUs computes other layers wrong."""


def make_kind(folder: Path, kind: str, **sizes: int) -> Path:
    """Write one of ``KINDS`` or ``OLDER_KINDS`` into a folder."""
    family = kind.removesuffix("_moe") if kind.startswith("qwen") else "qwen3_vl"
    return make_tiny(folder, moe=kind.endswith("moe"), family=family, **sizes)


def gradient_tolerance(name: str) -> float:
    """Return how far a float32 gradient may differ, relative to its largest value, if tokens are batched otherwise.

    The gradients of a delta net's decay are sums in which large terms cancel: right-padding the samples of the tiny
    checkpoints, without packing, changes them by 5e-5 and all others by less than 4e-6.
    """
    return 2e-4 if name.endswith((".A_log", ".dt_bias", ".in_proj_a.weight")) else 1e-5


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of smooth noise, which keeps structure when it is resized."""
    rng = np.random.default_rng([width, height, seed])
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class ListRecords:
    """Records in memory with the interface of `load_records`."""

    def __init__(self, records, name="list", datasets=None):
        self.records = records
        names = datasets or [name] * len(records)
        self.sources = [Source(dataset, f"{dataset}[{i}]") for i, dataset in enumerate(names)]
        self.fingerprint = f"{name}-{len(records)}-{id(self)}"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index], self.sources[index], None


def answers_of(*lengths):
    """Return records with very different supervised lengths, for which a mean of means is wrong."""
    return [
        {
            "image": [picture(64 + 32 * (i % 3), 64, i)],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe."},
                {"from": "gpt", "value": " ".join(f"word{k}" for k in range(length))},
            ],
        }
        for i, length in enumerate(lengths)
    ]


RECORDS = answers_of(1, 30, 2, 5, 17, 1, 9, 3)


def quiet_arguments(folder, **options):
    """Return TrainingArguments on the CPU without reports and progress bar; ``options`` override these."""
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_nan_inf_filter": False}
    return TrainingArguments(output_dir=str(folder), **(quiet | options))


def make_trainer(folder, checkpoint, encoder, *, records=RECORDS, datasets=None, trainer_options=None, **arguments):
    from qwenvl_ft.data.plan.dataset import SampleDataset
    from qwenvl_ft.model.load import load_model
    from qwenvl_ft.training.trainer import QwenVLTrainer

    model = load_model(str(checkpoint), torch_dtype="float32", attn_impl="sdpa")
    options = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9, "logging_steps": 1}
    options["save_strategy"] = "no"
    args = quiet_arguments(folder, **(options | arguments))
    dataset = SampleDataset(ListRecords(records, datasets=datasets), encoder, cache_dir=folder / "cache")
    more = {"packing": False, "max_length": 512} | (trainer_options or {})
    return QwenVLTrainer(model, args, processor=encoder.processor, train_dataset=dataset, eval_dataset=dataset, **more)


def one_step(trainer):
    """Return loss and gradients of one optimizer step over all eight samples."""
    kept = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return trainer.state.log_history[0]["loss"], kept


def stirred(model, scale):
    """Add noise of this scale to the trainable weights, the same each time, and return the model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn_like(value) * scale
    return model


def without_hooks(model):
    """Copy a model and remove all hooks of its modules."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return plain
