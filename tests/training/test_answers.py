"""Answers generated while a run trains: scored at each evaluation, with no effect on the weights."""

import json

import pytest
import torch
from dense_cases import dense_settings, write_dense
from run_cases import short_run
from safetensors.torch import load_file

from qwenvl_ft import train as train_function
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.evaluation.generate import evaluate
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training import answers as answers_module

ANSWER = [
    {"label": "cat", "bbox_2d": [1, 2, 3, 4]},
    {"label": "wire", "line": [1, 1, 9, 9]},
    {"label": "sign", "quad": [1, 1, 9, 1, 9, 9, 1, 9]},
]
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One question with a box, a line and a quad, to be learned by heart."""
    path = tmp_path_factory.mktemp("answers") / "data.jsonl"
    turns = [{"from": "human", "value": "Find."}, {"from": "gpt", "value": json.dumps(ANSWER)}]
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    return path


def settings(tiny_dir, data, output, *more):
    asks = any(word.startswith("evaluation.run_") and word.lower().endswith("=true") for word in more)
    asked = ("evaluation.metric=geometry", "evaluation.max_new_tokens=160") if asks else ()
    return short_run(
        tiny_dir,
        data,
        output,
        f"data.val={data}",
        "tuner.train_type=full",
        f"training.max_steps={STEPS}",
        "training.learning_rate=3e-3",
        "training.lr_scheduler_type=constant",
        "training.warmup_ratio=0",
        "training.activation_checkpointing=true",
        "training.gradient_accumulation_steps=1",
        "training.logging_steps=20",
        "training.eval_strategy=steps",
        "training.eval_steps=20",
        "training.eval_on_start=true",
        "training.save_strategy=best",
        *asked,
        *more,
    )


@pytest.fixture(scope="module")
def runs(tiny_dir, data, tmp_path_factory):
    """The same run with questions asked while it trains and after it, and without any: folder and result of each."""
    folder = tmp_path_factory.mktemp("answers_runs")
    asking = ["evaluation.run_during_training=true", "evaluation.run_after_training=true"]
    asking += ["training.metric_for_best_model=eval_geometry", "training.load_best_model_at_end=true"]
    return {
        name: (
            folder / name,
            train_function(load_recipe(None, settings(tiny_dir, data, folder / name, *more))),
        )
        for name, more in (("asked", asking), ("quiet", ["training.save_strategy=no"]))
    }


def entries(folder):
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def test_each_kind_is_scored_at_each_evaluation(runs):
    folder, _ = runs["asked"]
    logged = [entry for entry in entries(folder) if "eval_geometry" in entry]
    assert [entry["step"] for entry in logged] == [0, 20, 40, 60]
    first, last = logged[0], logged[-1]
    assert first["eval_geometry"] == 0.0, "vacuous: the untrained model finds everything"
    for kind in ("bbox", "quad", "line"):
        assert first[f"eval_geometry_{kind}_recall"] == 0.0
        assert last[f"eval_geometry_{kind}_f1"] == 1.0, "the answer is not learned"
    assert "geometry 1.0000  geometry_bbox_f1 1.0000" in (folder / "training.log").read_text()


def test_the_scores_are_those_of_the_saved_model_asked_again(runs, data):
    folder, result = runs["asked"]
    records = [json.loads(line) for line in data.read_text().splitlines()]
    model = load_model(str(folder), torch_dtype="float32")
    again = evaluate(model, load_processor(str(folder)), records, metric="geometry", max_new_tokens=160)
    assert result.metrics["geometry"] == again["geometry"] == 1.0
    assert result.metrics["geometry_quad_f1"] == again["scores"]["quad"]["f1"] == 1.0
    assert result.metrics["geometry_count"] == 1


def test_the_best_checkpoint_is_the_one_with_the_highest_score(runs):
    folder, _ = runs["asked"]
    state = json.loads((folder / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_geometry"] for entry in entries(folder) if "eval_geometry" in entry}
    assert state["best_metric"] == max(scores.values()) > min(scores.values())
    assert scores[state["best_global_step"]] == state["best_metric"]


def test_asking_changes_no_loss_of_training(runs):
    losses = {
        name: [entry["loss"] for entry in entries(folder) if "loss" in entry] for name, (folder, _) in runs.items()
    }
    assert len(losses["asked"]) >= STEPS // 20
    assert losses["asked"] == losses["quiet"]
    assert not any("eval_geometry" in entry for entry in entries(runs["quiet"][0]))


def test_compiled_layers_are_asked_as_written_and_compiled_again_afterwards(tiny_model):
    from qwenvl_ft.model.compiled import CompiledForward, compile_layers, layers_not_compiled, restore_layers
    from qwenvl_ft.upstream.layers import replaced_forward

    def compiled():
        return [m for m in tiny_model.modules() if isinstance(replaced_forward(m), CompiledForward)]

    tiny_model.config.use_cache = False
    compile_layers(tiny_model, backend="eager")
    before = compiled()
    kept = [replaced_forward(layer) for layer in before]
    assert before
    with layers_not_compiled(tiny_model):
        assert not compiled()
    assert compiled() == before
    assert [replaced_forward(layer) for layer in before] == kept
    restore_layers(tiny_model)


@pytest.mark.parametrize(("unit", "expected"), [("norm1000", {"scale": 1000.0}), ("norm100", {"scale": 100.0})])
def test_dense_captions_are_scored_in_the_unit_of_their_answers(tiny_dir, tmp_path, monkeypatch, unit, expected):
    assert asked_options(tiny_dir, tmp_path, monkeypatch, f"data.emit_norm={unit}") == expected


def test_dense_captions_in_pixels_are_scored_with_the_sizes_of_their_images(tiny_dir, tmp_path, monkeypatch):
    """Summaries are left out: they have no coordinates."""
    more = ("data.emit_norm=none", "data.summary_ratio=0.9")
    assert asked_options(tiny_dir, tmp_path, monkeypatch, *more) == {"sizes": [[(160, 128)] * 2] * 2}


def asked_options(tiny_dir, tmp_path, monkeypatch, *more):
    """Run one step on dense captions and return the options with which their answers were scored."""
    seen = {}
    original = answers_module.Questions.ask

    def ask(self, trainer, prefix=""):
        seen.update(self.options)
        return original(self, trainer, prefix)

    monkeypatch.setattr(answers_module.Questions, "ask", ask)
    data = write_dense(tmp_path / "dense", 4)
    asking = ("evaluation.run_after_training=true", "evaluation.metric=geometry", "evaluation.max_new_tokens=4")
    overrides = dense_settings(tiny_dir, data, tmp_path / "run", f"data.val={data}", "training.max_steps=1", *asking)
    result = train_function(load_recipe(None, [*overrides, "training.eval_strategy=no", *more]))
    assert result.metrics["geometry_count"] == 2
    return seen


def test_what_a_metric_cannot_score_is_refused_before_the_first_step(tiny_dir, data, tmp_path):
    other = tmp_path / "val.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    other.write_text(json.dumps({"conversations": turns}) + "\n")
    more = [f"evaluation.data={other}", "evaluation.run_during_training=true"]
    with pytest.raises(DataError, match=r"val.jsonl:1: geometry cannot score this answer: .*not a dense caption"):
        train_function(load_recipe(None, settings(tiny_dir, data, tmp_path / "run", *more)))
    more = ["evaluation.run_during_training=true", "evaluation.metric_options={iuo: 0.3}"]
    with pytest.raises(
        RecipeError, match=r"evaluation.metric_options: 'iuo' is no option of this metric. Did you mean"
    ):
        train_function(load_recipe(None, settings(tiny_dir, data, tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()


def test_asking_needs_evaluations_and_the_best_is_in_the_direction_of_the_metric(data):
    base = [f"data.train={data}", f"data.val={data}", "evaluation.run_during_training=true"]
    with pytest.raises(RecipeError, match=r"evaluation.run_during_training=true needs evaluations"):
        load_recipe(None, [*base, "training.eval_strategy=no"])
    best = ["training.save_strategy=best", "training.metric_for_best_model=eval_counting", "evaluation.metric=counting"]
    with pytest.raises(RecipeError, match="highest eval_counting, which is the worst"):
        load_recipe(None, [*base, *best, "training.greater_is_better=true"])
    best[1:] = ["training.metric_for_best_model=geometry", "evaluation.metric=geometry"]
    with pytest.raises(RecipeError, match="lowest geometry, which is the worst"):
        load_recipe(None, [*base, *best, "training.greater_is_better=false"])
    with pytest.raises(RecipeError, match="eval_geometry is not computed by evaluation"):
        load_recipe(None, [*base[:2], best[0], "training.metric_for_best_model=eval_geometry"])


@pytest.mark.parametrize(("metric", "greater"), [("geometry", True), ("counting", False), ("perplexity", False)])
def test_early_stopping_knows_the_direction_too(tiny_dir, data, tmp_path, metric, greater):
    from qwenvl_ft.training.arguments import build_arguments

    more = ["training.save_strategy=no", "training.early_stopping_patience=2"]
    more += [f"training.metric_for_best_model=eval_{metric}", "evaluation.run_during_training=true"]
    more += [f"evaluation.metric={'geometry' if metric == 'perplexity' else metric}"]
    recipe = load_recipe(None, settings(tiny_dir, data, tmp_path, *more))
    assert build_arguments(recipe).greater_is_better is greater


def test_weights_do_not_depend_on_being_asked(tiny_dir, data, tmp_path):
    weights = {}
    for asked in (True, False):
        more = [f"evaluation.run_during_training={asked}", "training.max_steps=4", "training.eval_steps=1"]
        folder = tmp_path / str(asked)
        train_function(load_recipe(None, settings(tiny_dir, data, folder, *more, "training.save_strategy=no")))
        weights[asked] = load_file(folder / "model.safetensors")
    assert weights[True].keys() == weights[False].keys()
    assert all(torch.equal(value, weights[False][name]) for name, value in weights[True].items())
