"""LISA trains a few layers of the language model at a time, drawn by seed and step; frozen layers lose their state."""

from types import SimpleNamespace

import pytest
import torch
from cases import MOST_KINDS, RECORDS, make_trainer
from transformers import TrainerCallback

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.arguments import build_arguments
from qwenvl_ft.training.callbacks.lisa import LisaCallback

STEPS, INTERVAL = 6, 2


class Watch(TrainerCallback):
    """Records after each step the layers that moved, those with optimizer state, and other weights that moved."""

    def __init__(self):
        self.moved, self.kept, self.others = [], [], []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, self.before[name])}
        held = {name for name, value in model.named_parameters() if value in optimizer.state}
        self.moved.append(layers_of(changed))
        self.kept.append(layers_of(held))
        self.others.append({name for name in changed if ".layers." not in name})


def layers_of(names):
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name})


def run(folder, checkpoint, encoder, *, seed=7, resume=None, **more):
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
    options |= {"learning_rate": 1e-3, "max_grad_norm": 1.0}
    trainer = make_trainer(folder, checkpoint, encoder, records=RECORDS, **(options | more))
    lisa, watch = LisaCallback(2, INTERVAL, seed), Watch()
    trainer.add_callback(lisa)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_two_layers_train_at_a_time(checkpoints, encoder, tmp_path, kind):
    trainer, watch = run(tmp_path, checkpoints[kind], encoder)
    assert all(len(layers) == 2 for layers in watch.moved)
    assert watch.kept == watch.moved, "state of a frozen layer was kept"
    pairs = [watch.moved[start : start + INTERVAL] for start in range(0, STEPS, INTERVAL)]
    assert all(first == second for first, second in pairs), "drawn anew inside an interval"
    assert len({tuple(first) for first, _ in pairs}) > 1, "vacuous: always the same layers"
    for others in watch.others:
        assert any("embed_tokens" in name for name in others)
        assert any("visual.merger" in name for name in others), "the other parts train as they did"
    assert all(value.requires_grad for value in trainer.model.parameters()), "left frozen after the run"


def test_layers_that_are_frozen_by_name_are_not_drawn(checkpoints, encoder, tmp_path):
    def frozen(trainer, *layers):
        for name, value in trainer.model.named_parameters():
            value.requires_grad_(not any(f".layers.{layer}." in name for layer in layers))

    trainer, lisa = make_trainer(tmp_path, checkpoints["dense"], encoder, records=RECORDS), LisaCallback(2, 1, 7)
    frozen(trainer, 0, 1)
    lisa.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    for step in range(8):
        trainer.state.global_step = step
        lisa.on_step_begin(trainer.args, trainer.state, trainer.control, optimizer=torch.optim.SGD([torch.zeros(1)]))
        assert lisa.active == [2, 3]
    lisa.on_train_end(trainer.args, trainer.state, trainer.control)
    lisa.on_step_begin(trainer.args, trainer.state, trainer.control, optimizer=torch.optim.SGD([torch.zeros(1)]))
    frozen_now = [not value.requires_grad for value in trainer.model.parameters()]
    assert any(frozen_now)
    lisa.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert lisa.candidates == [2, 3], "a run that begins again, with layers left frozen by the draw before"
    assert not lisa.active, "a run that resumes between two draws would train all layers until the next"
    lisa.on_train_end(trainer.args, trainer.state, trainer.control)
    frozen(trainer, 0, 1, 2)
    with pytest.raises(RecipeError, match=r"lisa_activated_layers=2, but .* has 4 layers, and 3 of them are frozen\."):
        lisa.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_another_seed_draws_other_layers(checkpoints, encoder, tmp_path):
    draws = {seed: run(tmp_path / str(seed), checkpoints["dense"], encoder, seed=seed)[1].moved for seed in (7, 7 + 1)}
    assert draws[7] != draws[8]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_draws_the_same_and_ends_at_the_same_bits(checkpoints, encoder, tmp_path, step):
    """Resumed inside an interval and between two."""
    whole, watch = run(tmp_path / "whole", checkpoints["dense"], encoder)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    again, later = run(tmp_path / "again", checkpoints["dense"], encoder, resume=checkpoint)
    assert later.moved == watch.moved[step:]
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_more_layers_than_there_are_is_an_error(checkpoints, encoder, tmp_path):
    trainer = make_trainer(tmp_path, checkpoints["dense"], encoder)
    trainer.add_callback(LisaCallback(5, 1, 0))
    with pytest.raises(RecipeError, match="lisa_activated_layers=5, but the language model has 4 layers"):
        trainer.train()


def test_several_processes_look_for_the_weights_without_a_gradient(tmp_path):
    words = ["tuner.train_type=full", f"training.output_dir={tmp_path}", "training.report_to=none"]
    lisa = [*words, "training.lisa_activated_layers=2"]
    found = [build_arguments(load_recipe(None, settings)).ddp_find_unused_parameters for settings in (words, lisa)]
    assert found == [False, True]
    with pytest.raises(RecipeError, match="ddp_find_unused_parameters=false cannot hold"):
        load_recipe(None, [*lisa, "training.ddp_find_unused_parameters=false"])
    several = SimpleNamespace(world_size=2, deepspeed=None, fsdp=[], ddp_find_unused_parameters=None)
    with pytest.raises(RecipeError, match="Set ddp_find_unused_parameters=True in TrainingArguments"):
        LisaCallback(2, 1, 0).on_train_begin(several, None, None)
