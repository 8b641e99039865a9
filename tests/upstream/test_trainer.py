"""upstream/trainer.py: transformers calls each hook at the right point, and another loop is refused in one line."""

import os

import pytest
import torch
from cases import RECORDS, make_trainer
from transformers import Trainer

from qwenvl_ft.errors import RecipeError, TrainingError
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.upstream import trainer as upstream

CALLED = ("before_wrapping", "resume_at", "begin_epoch", "end_epoch", "saving", "save_beside_optimizer")


@pytest.fixture(autouse=True)
def asked_anew():
    upstream.LOOP.missing.cache_clear()
    yield
    upstream.LOOP.missing.cache_clear()


def test_every_hook_is_called_in_its_place(tmp_path, tiny_dir, encoder, monkeypatch):
    order = []
    for name in CALLED:
        method = getattr(QwenVLTrainer, name)

        def noted(self, *arguments, name=name, method=method):
            order.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(QwenVLTrainer, name, noted)
    trainer = make_trainer(
        tmp_path, tiny_dir, encoder, per_device_train_batch_size=8, max_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    saved = ["saving", "save_beside_optimizer"]
    assert order == ["resume_at", "before_wrapping", "begin_epoch", "end_epoch", "begin_epoch", *saved, "end_epoch"]
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_accelerator_compiles_nothing_and_the_settings_stay(tmp_path, tiny_dir, encoder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    trainer = make_trainer(tmp_path, tiny_dir, encoder, torch_compile=True, torch_compile_backend="aot_eager")
    assert trainer.accelerator.state.dynamo_plugin.backend.value.lower() == "no"
    assert (trainer.args.torch_compile, trainer.args.torch_compile_backend) == (True, "aot_eager")
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] in ("eager", "aot_eager"), "what was there stays"


@pytest.mark.parametrize("name", upstream.OVERRIDDEN | upstream.CALLED)
def test_a_release_that_renames_a_method_is_refused_in_one_line(
    name, tmp_path, tiny_dir, encoder, monkeypatch, asked_anew
):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(RecipeError, match=f"has no Trainer.{name}. Install a transformers that") as caught:
        make_trainer(tmp_path, tiny_dir, encoder)
    assert "\n" not in str(caught.value)


def test_a_release_with_a_new_required_argument_is_refused(tmp_path, tiny_dir, encoder, monkeypatch, asked_anew):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, mesh: None)
    with pytest.raises(RecipeError, match="needs 'mesh'"):
        make_trainer(tmp_path, tiny_dir, encoder)


def test_a_release_that_scales_the_loss_again_ends_the_run(tmp_path, tiny_dir, encoder, monkeypatch):
    """As transformers does unless a model or its loss function declares that it has done so."""
    step = Trainer.training_step

    def halved(self, model, inputs, num_items_in_batch=None):
        return step(self, model, inputs, num_items_in_batch) / 2

    monkeypatch.setattr(Trainer, "training_step", halved)
    trainer = make_trainer(tmp_path, tiny_dir, encoder, per_device_train_batch_size=8)
    with pytest.raises(TrainingError, match=r"step 1: transformers .* made .* of the loss"):
        trainer.train()


def test_accumulated_losses_are_not_divided_by_transformers(tmp_path, tiny_dir, encoder):
    losses = []
    for name, rows in (("whole", 8), ("parts", 1)):
        trainer = make_trainer(
            tmp_path / name,
            tiny_dir,
            encoder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(RECORDS) // rows,
        )
        trainer.train()
        entry = trainer.state.log_history[0]
        losses.append((entry["loss"], entry["grad_norm"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_transformers_does_not_know_passes_through_unchanged(tmp_path, tiny_dir, encoder):
    """A batch on its device is passed inside an object."""
    seen = []

    class Seen(QwenVLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(inputs["batch"].tensors["input_ids"].dtype)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make_trainer(tmp_path, tiny_dir, encoder, per_device_train_batch_size=8)
    trainer.__class__ = Seen
    trainer.train()
    assert seen == [torch.int64]
