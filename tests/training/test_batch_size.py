"""auto_find_batch_size reduces a batch that does not fit; the run equals one that asked for the smaller batch."""

import multiprocessing

import pytest
import torch
from cases import make_trainer

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.arguments import build_arguments


@pytest.mark.parametrize("packing", [False, True])
def test_what_fits_trains_the_same_weights_as_if_it_had_been_asked_for(
    packing, tiny_dir, encoder, tmp_path, monkeypatch
):
    def run(rows, **arguments):
        trainer = make_trainer(
            tmp_path,
            tiny_dir,
            encoder,
            max_steps=3,
            learning_rate=1e-3,
            per_device_train_batch_size=rows,
            trainer_options={"packing": packing, "max_length": 256},
            **arguments,
        )
        step = trainer.training_step

        def limited(model, inputs, *more):
            if trainer.rows_per_pass > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return step(model, inputs, *more)

        monkeypatch.setattr(trainer, "training_step", limited)
        trainer.train()
        return trainer

    found, asked = run(4, auto_find_batch_size=True), run(2)
    assert found.state.train_batch_size == 2
    fills = [[entry.get("row_fill") for entry in trainer.state.log_history] for trainer in (found, asked)]
    assert fills[0] == fills[1]
    assert any(fills[0]) == packing
    asked_weights = asked.model.state_dict()
    assert all(torch.equal(value, asked_weights[name]) for name, value in found.model.state_dict().items())
    with pytest.raises(RuntimeError, match="out of memory"):
        run(4)


def test_it_is_refused_with_deepspeed(tiny_dir, tmp_path, monkeypatch):
    overrides = [f"model.model={tiny_dir}", "training.auto_find_batch_size=true", f"training.output_dir={tmp_path}"]
    recipe = load_recipe(None, [*overrides, "training.use_cpu=true", "training.report_to=none"])
    args = build_arguments(recipe)
    assert args.auto_find_batch_size
    monkeypatch.setattr(args, "deepspeed", {})
    from qwenvl_ft.training.preflight import preflight

    with pytest.raises(RecipeError, match="one process without DeepSpeed"):
        preflight(recipe, args)


def test_workers_start_the_way_that_is_asked_for(tiny_dir, encoder, tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    loader = make_trainer(tmp_path, tiny_dir, encoder, **options).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_no_worker_outlives_the_training_or_an_evaluation(tiny_dir, encoder, tmp_path):
    """Else the run waits five seconds for each loader when its memory is freed."""
    before = set(multiprocessing.active_children())
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, tiny_dir, encoder, eval_strategy="epoch", **options)
    trainer.train()
    assert trainer.callback_handler.train_dataloader.persistent_workers, "vacuous: they end with their epoch"
    assert set(multiprocessing.active_children()) == before
    trainer.evaluate()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (16, 4, 3), (128, 8, 8)])
def test_workers_share_the_cores_unless_the_recipe_says_how_many(monkeypatch, tmp_path, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    overrides = [f"training.output_dir={tmp_path}", "training.use_cpu=true", "training.report_to=none"]
    assert build_arguments(load_recipe(None, overrides)).dataloader_num_workers == workers
    own = load_recipe(None, [*overrides, "training.dataloader_num_workers=5"])
    assert build_arguments(own).dataloader_num_workers == 5
    with pytest.raises(RecipeError, match="dataloader_num_workers"):
        load_recipe(None, [*overrides, "training.dataloader_num_workers=-1"])
