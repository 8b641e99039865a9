"""Gradient norms by part are those before clipping; a part without gradients is reported with the reason."""

import logging

import pytest
import torch
from cases import RECORDS, make_trainer
from transformers import TrainerCallback

from qwenvl_ft.model.anatomy import PARTS, part_of
from qwenvl_ft.training.gradients import PartGradients

TEXT = [
    {"conversations": [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": f"{n} it is"}]}
    for n in range(8)
]
LATE_IMAGE = [
    {
        "image": record["image"],
        "conversations": [
            {"from": "human", "value": "Say it."},
            {"from": "gpt", "value": "It is said."},
            {"from": "human", "value": "<image>\nThanks."},
        ],
    }
    for record in RECORDS
]


class Gradients(TrainerCallback):
    """Return the norm by part of the first step, computed by hand from what the optimizer sees."""

    def __init__(self):
        self.norms = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not self.norms:
            for name, value in model.named_parameters():
                square = float(value.grad.double().square().sum())
                self.norms[part_of(name)] = self.norms.get(part_of(name), 0.0) + square
            self.norms = {part: square**0.5 for part, square in self.norms.items()}


def logged(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("clip", [1e-2, 1e9, 0.0])
def test_the_norms_are_those_before_clipping(checkpoints, encoder, tmp_path, clip):
    options = {"max_grad_norm": clip, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, checkpoints["dense"], encoder, **options)
    seen = Gradients()
    trainer.add_callback(seen)
    entry = logged(trainer)[0]
    found = {part: entry[f"grad_norm/{part}"] for part in PARTS}
    total = sum(norm**2 for norm in found.values()) ** 0.5
    assert total == pytest.approx(entry["grad_norm"], rel=1e-5)
    scale = entry["grad_norm"] / sum(norm**2 for norm in seen.norms.values()) ** 0.5
    assert found == pytest.approx({part: norm * scale for part, norm in seen.norms.items()}, rel=1e-4)
    assert (scale > 1.5) == (clip == 1e-2), "vacuous: nothing was clipped"


@pytest.mark.parametrize(
    ("records", "cause"),
    [
        (TEXT, "no record of data.train has an image or a video"),
        (LATE_IMAGE, "no supervised token comes after an image or video"),
    ],
    ids=["text", "late image"],
)
def test_parts_without_a_gradient_are_said_once_with_the_reason(checkpoints, encoder, tmp_path, caplog, records, cause):
    options = {"zero_gradient_steps": 3}
    trainer = make_trainer(
        tmp_path, checkpoints["dense"], encoder, records=records, trainer_options=options, max_steps=8
    )
    with caplog.at_level(logging.WARNING, logger="qwenvl_ft.training.gradients"):
        entries = logged(trainer)
    assert [entry["grad_norm/vision"] for entry in entries] == [0.0] * 8
    assert all(entry["grad_norm/llm"] > 0 for entry in entries)
    lines = [record.getMessage() for record in caplog.records if record.name == "qwenvl_ft.training.gradients"]
    assert len(lines) == 2
    for part, flag in (("vision", "freeze_vit"), ("merger", "freeze_aligner")):
        (line,) = [line for line in lines if f"the {part} part" in line]
        assert "for 3 steps" in line
        assert cause in line
        assert f"tuner.{flag}=true" in line


def test_parts_with_a_gradient_and_frozen_parts_are_not_warned_of(checkpoints, encoder, tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, checkpoints["dense"], encoder, trainer_options={"zero_gradient_steps": 1}, max_steps=4
    )
    trainer.model.model.visual.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger="qwenvl_ft.training.gradients"):
        entry = logged(trainer)[-1]
    assert [key for key in entry if key.startswith("grad_norm/")] == ["grad_norm/llm"]
    assert not [record for record in caplog.records if record.name == "qwenvl_ft.training.gradients"]


def measure(gradients, model):
    gradients.on_pre_optimizer_step(None, None, None, model=model)


def test_a_gradient_that_comes_back_starts_the_count_anew(tiny_model, caplog):
    gradients = PartGradients(3, has_media=True)
    for index in range(9):
        for value in tiny_model.parameters():
            value.grad = torch.ones_like(value)
        if index % 3:
            for value in tiny_model.model.visual.parameters():
                value.grad = None
        measure(gradients, tiny_model)
    assert gradients.read(None)["grad_norm/vision"] == 0.0
    assert not caplog.records
    measure(gradients, tiny_model.requires_grad_(True))
    for value in tiny_model.model.visual.parameters():
        value.grad = None
    measure(gradients, tiny_model)
    gradients.read(None)
    assert sum("vision part" in record.getMessage() for record in caplog.records) == 1


def test_nothing_is_measured_where_gradients_are_hidden(tiny_model):
    """As under DeepSpeed: a norm is logged, and no parameter has a gradient."""
    gradients = PartGradients(1, has_media=True)
    measure(gradients, tiny_model)
    assert gradients.read(3.0) == {}
