"""Trains a method by base.yaml as shipped (bfloat16, attention, workers) except for model, data, steps and folders."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import yaml
from methods_cases import BASES, Case, tuner_of

from qwenvl_ft.assemble import build_datasets, build_model, build_processor
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.methods import reads
from qwenvl_ft.training.build import build_trainer
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.prepare import prepare_run

BASE = Path(__file__).resolve().parents[1] / "recipes" / "base.yaml"
STEPS = {
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
}
"""Settings under ``training`` for a run of seconds."""


@cache
def write_digits(folder: Path) -> Path:
    """Write 48 handwritten digits of scikit-learn as a record file with images, and return its path."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data, lines = load_digits(), []
    folder.mkdir(parents=True, exist_ok=True)
    for index, (ink, digit) in enumerate(zip(data.images[:48], data.target[:48], strict=True)):
        Image.fromarray((ink * 15.9).astype("uint8")).resize((64, 64)).convert("RGB").save(folder / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich digit is this?"},
            {"from": "gpt", "value": str(digit)},
        ]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": turns}))
    path = folder / "digits.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_of(case: Case, kind: str, model: Path, folder: Path):
    """Return base.yaml with a case's method, rate and parts; every other setting is the one that users get."""
    tuner = tuner_of(case, kind)
    keys = {*case.tuner, "freeze_llm", "freeze_vit", "freeze_aligner", "lora_rank"}
    training = STEPS | case.arguments | {"learning_rate": case.rate, "output_dir": str(folder / "run")}
    if case.lisa:
        training |= {"lisa_activated_layers": case.lisa, "lisa_step_interval": 2}
    sections = {
        "extends": str(BASE),
        "model": {"model": str(model)},
        "quantization": {key: value for key, value in BASES[case.bits].items() if key == "quantization_bit"},
        "template": {"max_length": 256, "max_pixels": 65536},
        "data": {"train": str(write_digits(model / "digits"))},
        "tuner": {key: getattr(tuner, key) for key in keys if reads(tuner.train_type, key)},
        "training": training,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return load_recipe(file)


def check_shipped(case: Case, kind: str, model: Path, folder: Path) -> bool:
    """Return True if a run lowers the loss and changes exactly the weights that would train in float32."""
    recipe = recipe_of(case, kind, model, folder)
    assert recipe.model.torch_dtype == "bfloat16"
    args = prepare_run(recipe)
    processor = build_processor(recipe)
    samples, _ = build_datasets(recipe, processor, args.seed)
    whole = replace(recipe, model=replace(recipe.model, torch_dtype="float32"))
    trainable = {name for name, value in build_model(whole, args, samples).named_parameters() if value.requires_grad}
    prepared = build_model(recipe, args, samples)
    before = {name: value.detach().clone() for name, value in prepared.named_parameters()}
    trainer = build_trainer(recipe, args, prepared, processor, samples)
    first = _loss(prepared, samples)
    trainer.train()
    moved = {name for name, value in prepared.named_parameters() if not torch.equal(value, before[name])}
    if case.tuner.get("train_type") == "adalora":  # zero before the run, and zero when all ranks of a layer are pruned
        moved |= {name for name in trainable if name.endswith("lora_E.default") and not before[name].any()}
    return bool(trainable) and moved == trainable and _loss(prepared, samples) < 0.97 * first


def _loss(model, samples) -> float:
    """Return the summed loss over the answers to 16 digits, computed as training does.

    In training mode, because on a CPU bitsandbytes rewrites 4-bit weights in evaluation mode.
    """
    model.train()
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return float(loss_sum(model, split_labels(QwenVLCollator()([samples[index] for index in range(16)]))))
