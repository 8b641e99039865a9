"""A script of one's own trains what its recipe says: the documented lines run, and a model that differs is refused."""

import re
from pathlib import Path

import pytest
import torch
from run_cases import run_settings, short_run, write_questions, write_records
from safetensors.torch import load_file

from qwenvl_ft import keep_float32, load_model, load_recipe, prepare_model, train
from qwenvl_ft.assemble import build_datasets, build_model, build_processor
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.training.build import build_trainer
from qwenvl_ft.training.callbacks.stopping import PatienceCallback
from qwenvl_ft.training.matches_recipe import settings_of
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.training.trainer import QwenVLTrainer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "scripts.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("script_data"))


def test_the_lines_of_the_guide_run_as_written(tiny_dir, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    write_questions(tmp_path, 8, "my")
    short = f'"model.model={tiny_dir}", "training.max_steps=2", "training.report_to=none"]'
    assert '"training.output_dir=output/mine"]' in blocks[0]
    blocks[0] = blocks[0].replace('"training.output_dir=output/mine"]', f'"training.output_dir=output/mine", {short}')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "output/mine/adapter_model.safetensors").is_file()
    assert re.search(r"it is \d", names["answer"])
    from_recipe = blocks[0].split("args = ")[1].split("trainer.train")[0].strip()
    assert len(from_recipe.splitlines()) == 5, "five lines from a recipe to a trainer"


def test_these_lines_train_the_weights_of_the_train_command(tiny_dir, data, tmp_path):
    more = ("training.save_strategy=no", "training.eval_strategy=no", "training.early_stopping_patience=null")
    recipes = [load_recipe(None, run_settings(tiny_dir, data, tmp_path / name, *more)) for name in ("own", "command")]
    trainer = built(recipes[0])
    trainer.train()
    trainer.save_model()
    train(recipes[1])
    own, command = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "command"))
    assert all(torch.equal(own[name], command[name]) for name in command)
    assert any(not torch.equal(own[name], value) for name, value in load_file(tiny_dir / "model.safetensors").items())


def test_the_recipes_callbacks_come_with_the_trainer(tiny_dir, data, tmp_path):
    trainer = built(load_recipe(None, run_settings(tiny_dir, data, tmp_path, "training.early_stopping_patience=2")))
    assert any(isinstance(callback, PatienceCallback) for callback in trainer.callback_handler.callbacks)


def built(recipe, model=None):
    args = prepare_run(recipe)
    processor = build_processor(recipe)
    train_set, eval_set = build_datasets(recipe, processor)
    model = build_model(recipe, args, train_set) if model is None else model
    return build_trainer(recipe, args, model, processor, train_set, eval_set)


def loaded(tiny_dir, dtype="float32"):
    return load_model(str(tiny_dir), torch_dtype=dtype, attn_impl="sdpa")


@pytest.fixture
def lora(tiny_dir, data, tmp_path):
    """Load a recipe with LoRA: ``lora("key=value")``."""
    return lambda *more: load_recipe(None, short_run(tiny_dir, data / "train.jsonl", tmp_path / "run", *more))


def test_a_model_that_was_not_prepared_is_refused_with_the_missing_call(tiny_dir, lora):
    model = loaded(tiny_dir)
    count = f"{sum(value.numel() for value in model.parameters()):,}"
    words = rf"tuner\.train_type=lora, but .* {count} weights would train\. .*prepare_model\(model, recipe\.tuner\)"
    with pytest.raises(RecipeError, match=words):
        built(lora(), model)


def test_full_training_too_needs_a_prepared_model(tiny_dir, lora):
    with pytest.raises(RecipeError, match=r"tuner\.train_type=full, but the model was not prepared for it"):
        built(lora("tuner.train_type=full"), loaded(tiny_dir))


def test_a_model_prepared_by_another_recipe_is_refused_with_the_key(tiny_dir, lora):
    model = prepare_model(loaded(tiny_dir), lora("tuner.lora_rank=4").tuner)
    with pytest.raises(RecipeError, match=r"prepared with tuner\.lora_rank=4, but the recipe says 8\."):
        built(lora(), model)


def test_weights_unfrozen_after_preparing_are_refused(tiny_dir, lora):
    recipe = lora()
    model = prepare_model(loaded(tiny_dir), recipe.tuner)
    assert built(recipe, model).model is model
    next(value for value in model.parameters() if not value.requires_grad).requires_grad_(True)
    with pytest.raises(RecipeError, match="1 weights of the base model would train too"):
        built(recipe, model)


def test_weights_that_would_train_in_bfloat16_are_refused(tiny_dir, lora):
    recipe = lora("tuner.train_type=full", "model.torch_dtype=bfloat16")
    model = prepare_model(loaded(tiny_dir, "bfloat16"), recipe.tuner)
    with pytest.raises(RecipeError, match=r"would train in bfloat16.* keep_float32\(model\)"):
        built(recipe, model)
    keep_float32(model)
    assert built(recipe, model).model is model


def test_a_model_of_ones_own_trains_what_requires_gradients(tiny_dir, lora, data, tmp_path):
    recipe, model = lora("training.max_steps=2", "training.learning_rate=1e-2"), loaded(tiny_dir)
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    args, processor = prepare_run(recipe), build_processor(recipe)
    train_set, _ = build_datasets(recipe, processor)
    options = {"processor": processor, "train_dataset": train_set, "recipe": recipe}
    with pytest.raises(RecipeError, match="check_model=False"):
        QwenVLTrainer(model, args, **options)
    QwenVLTrainer(model, args, **options, check_model=False).train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(".merger." in name for name in moved)


def test_arguments_that_differ_from_the_recipe_are_refused_with_the_key(lora):
    recipe = lora("training.vit_lr=1e-5", "training.z_loss=1e-4", "template.max_length=128", "tuner.freeze_vit=false")
    args, processor = prepare_run(recipe), build_processor(recipe)
    train_set, _ = build_datasets(recipe, processor)
    model = build_model(recipe, args, train_set)
    options = {"processor": processor, "train_dataset": train_set, "recipe": recipe}
    right = {name: value for name, (_, value) in settings_of(recipe).items()}
    QwenVLTrainer(model, args, **options, **right)
    for name, key in (("vit_lr", "training.vit_lr"), ("z_loss", "training.z_loss"), ("max_length", "template.max_")):
        given = {other: value for other, value in right.items() if other != name}
        with pytest.raises(RecipeError, match=rf"the recipe says {key}.*, but the trainer was given {name}=.* or pass"):
            QwenVLTrainer(model, args, **options, **given)
    QwenVLTrainer(model, args, **options, check_model=False)
