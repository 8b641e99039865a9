"""Several validation sets: a loss each, and one over all of them that selects the best checkpoint."""

import json
import math

import pytest
from cases import ListRecords, answers_of, make_trainer
from run_cases import short_run, write_questions

from qwenvl_ft import train
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.recipe.load import load_recipe


def test_each_set_has_the_loss_it_has_alone_and_all_that_of_one_joined_set(tiny_dir, encoder, tmp_path):
    short, long = answers_of(1, 2, 1), answers_of(30, 17)
    trainer = make_trainer(tmp_path, tiny_dir, encoder)
    make = lambda records, name: SampleDataset(ListRecords(records, name), encoder, cache_dir=tmp_path / "c")  # noqa: E731
    alone = {name: trainer.evaluate(make(records, name)) for name, records in (("short", short), ("long", long))}
    whole = trainer.evaluate(make(short + long, "joined"))
    trainer.eval_dataset = {"short": make(short, "short"), "long": make(long, "long")}
    metrics = trainer.evaluate()
    for name, metrics_alone in alone.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(metrics_alone["eval_loss"], rel=1e-6)
    for key in ("eval_loss", "eval_perplexity", "eval_supervised_tokens"):
        assert metrics[key] == pytest.approx(whole[key], rel=1e-5)
    mean_of_means = sum(metrics_alone["eval_loss"] for metrics_alone in alone.values()) / 2
    assert abs(mean_of_means - whole["eval_loss"]) > 1e-3, "vacuous: a mean of means agrees too"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name, count in (("train", 8), ("a", 3), ("b", 2)):
        write_questions(folder, count, name, answer=name, widths=(64,), longest=1)
    return folder


@pytest.mark.parametrize("best", ["eval_loss", "b_loss"])
def test_a_run_logs_them_and_keeps_the_best_by_the_metric_that_is_named(tiny_dir, files, tmp_path, best):
    recipe = load_recipe(
        None,
        short_run(
            tiny_dir,
            files / "train.jsonl",
            tmp_path,
            f'data.val={{"a": "{files / "a.jsonl"}", "b": "{files / "b.jsonl"}"}}',
            "template.max_length=160",
            "tuner.train_type=full",
            "training.max_steps=3",
            "training.learning_rate=1e-3",
            "training.eval_steps=1",
            "training.save_strategy=best",
            f"training.metric_for_best_model={best}",
            "training.early_stopping_patience=3",
            "training.activation_checkpointing=false",
            "evaluation.run_after_training=true",
            "evaluation.max_new_tokens=2",
        ),
    )
    result = train(recipe)
    entries = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    by_step = {}
    for entry in entries:
        by_step.setdefault(entry["step"], {}).update(entry)
    assert set(by_step) >= {1, 2, 3}
    for step in (1, 2, 3):
        assert {"eval_a_loss", "eval_b_loss", "eval_loss"} <= by_step[step].keys()
        assert all(math.isfinite(by_step[step][f"eval_{name}_loss"]) for name in "ab")
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    key = best if best.startswith("eval_") else f"eval_{best}"
    assert state["best_metric"] == pytest.approx(min(by_step[step][key] for step in (1, 2, 3)))
    assert result.metrics["exact_match_count"] == 5, "both sets are asked"
    log = (tmp_path / "training.log").read_text()
    assert "eval_a_loss" in log
    assert "data.val.b: 2 samples" in log
