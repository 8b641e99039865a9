"""A run from recipe to checkpoint: its files, its logs, and resuming, serving and repeating it."""

import json
import math
import shutil
import signal

import pytest
import torch
from cases import picture
from run_cases import run_settings, write_records
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl_ft import train as train_function
from qwenvl_ft.checkpoint.complete import last_checkpoint
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.callbacks.signals import SignalCallback


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("run_data"))


@pytest.fixture(scope="module")
def finished(tiny_dir, data, tmp_path_factory):
    """A finished run: its folder and its result."""
    output = tmp_path_factory.mktemp("finished") / "run"
    more = ("training.load_best_model_at_end=true", "evaluation.run_after_training=true", "evaluation.max_new_tokens=4")
    return output, train_function(load_recipe(None, run_settings(tiny_dir, data, output, *more)))


def test_a_run_leaves_what_is_needed_to_serve_inspect_and_repeat_it(finished):
    output, result = finished
    assert result.steps == 6
    assert {p.name for p in output.glob("checkpoint-*")} <= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert len(list(output.glob("checkpoint-*"))) == 2, "save_total_limit is 2"
    for folder in (output, *output.glob("checkpoint-*")):
        names = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "recipe.yaml"} <= names
        assert {"trainer_state.json", "training_args.bin"} <= names
    assert {"training.log", "trainer_log.jsonl"} <= {path.name for path in output.iterdir()}
    assert 0.0 <= result.metrics["exact_match"] <= 1.0
    assert result.metrics["exact_match_count"] == 3


def test_without_save_final_a_run_writes_no_weights(tiny_dir, data, tmp_path):
    more = ("training.max_steps=1", "training.save_strategy=no", "training.eval_strategy=no")
    for saved in (True, False):
        output = tmp_path / str(saved)
        overrides = run_settings(tiny_dir, data, output, *more, f"training.save_final={saved}")
        assert train_function(load_recipe(None, overrides)).steps == 1
        assert bool(list(output.rglob("*.safetensors"))) is saved
        assert (output / "trainer_log.jsonl").exists()


def test_the_log_tells_rates_speed_fill_and_progress(finished):
    output, _ = finished
    entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "grad_norm", "learning_rate", "lr/vision", "lr/merger", "lr/llm", "tokens_per_second"}
    expected |= {"supervised_tokens", "row_fill", "samples_seen", "peak_memory_gib", "eta_seconds", "total_steps"}
    assert expected <= steps[0].keys()
    rows = [round(entry["row_fill"] * 160) for entry in steps]
    per_epoch = next(k for k in range(1, 7) if steps[k - 1]["samples_seen"] == 8)
    assert [entry["samples_seen"] for entry in steps][per_epoch - 1] == 8
    assert sum(rows[:per_epoch]) == sum(rows[per_epoch : 2 * per_epoch]), "both epochs have the same tokens"
    assert all(0 < entry["row_fill"] <= 1 for entry in steps)
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert evaluations[0]["eval_perplexity"] == pytest.approx(math.exp(evaluations[0]["eval_loss"]), rel=1e-6)
    assert "step 6/6" in (output / "training.log").read_text()


def test_the_checkpoint_is_served_by_plain_transformers_and_the_loss_has_fallen(finished, tiny_dir):
    """Upstream classes and loader alone; the trained model's own loss on the training picture is lower."""
    output, _ = finished
    processor = AutoProcessor.from_pretrained(output)
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "it is 1 it is 1 "}]},
        ],
        tokenize=False,
    )
    inputs = processor(text=[text], images=[picture(80, 64, 1)], return_tensors="pt")
    losses = {}
    for name, folder in (("before", tiny_dir), ("after", output)):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        with torch.no_grad():
            losses[name] = float(model(**inputs, labels=inputs["input_ids"]).loss)
    assert losses["after"] < losses["before"] - 0.05
    assert model.config.text_config.use_cache is True


def test_the_saved_recipe_runs_again_to_the_same_weights(finished, tmp_path):
    output, _ = finished
    again = load_recipe(output / "recipe.yaml", [f"training.output_dir={tmp_path / 'again'}"])
    train_function(again)
    first, second = load_file(output / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = load_recipe(output / "recipe.yaml", [f"training.output_dir={tmp_path / 'third'}", "training.seed=7"])
    train_function(third)
    other = load_file(tmp_path / "third" / "model.safetensors")
    assert not all(torch.equal(first[name], other[name]) for name in first), "vacuous: the seed does nothing"


def test_save_strategy_best_keeps_the_best_and_early_stopping_ends_the_run(tiny_dir, data, tmp_path):
    """At this learning rate the loss explodes after the first steps, so the first evaluation stays the best."""
    more = [
        "training.save_strategy=best",
        "training.learning_rate=3.0",
        "training.lr_scheduler_type=constant",
        "training.early_stopping_patience=2",
        "training.max_steps=40",
        "training.save_total_limit=2",
        "training.load_best_model_at_end=true",
    ]
    result = train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path, *more)))
    entries = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert result.steps == best + 4 < 40, "two evaluations without a better one"
    assert (tmp_path / f"checkpoint-{best}").is_dir()
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in kept)


def test_save_strategy_epoch_writes_a_checkpoint_at_each_end_and_goes_on_from_one(tiny_dir, data, tmp_path):
    more = ("training.max_steps=-1", "training.num_train_epochs=3", "training.save_strategy=epoch")
    words = run_settings(tiny_dir, data, tmp_path, *more, "training.save_total_limit=9", "training.packing=false")
    result = train_function(load_recipe(None, words))
    steps, rest = divmod(result.steps, 3)
    assert rest == 0
    assert steps > 1, "vacuous: an epoch is a step"
    saved = [tmp_path / f"checkpoint-{steps * epoch}" for epoch in (1, 2, 3)]
    assert sorted(tmp_path.glob("checkpoint-*")) == sorted(saved)
    whole = load_file(saved[2] / "model.safetensors")
    shutil.rmtree(saved[2])
    train_function(load_recipe(None, [*words, f"training.resume_from_checkpoint={saved[1]}"]))
    again = load_file(saved[2] / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function of a step, just before whose end the run gets SIGTERM."""

    def stop(step):
        plain = SignalCallback.on_step_end

        def on_step_end(self, args, state, control, **more):
            if state.global_step == step:
                self.received = signal.SIGTERM
            return plain(self, args, state, control, **more)

        monkeypatch.setattr(SignalCallback, "on_step_end", on_step_end)

    return stop


def test_a_signal_leaves_a_checkpoint_to_go_on_from_whatever_is_saved_otherwise(
    finished, tiny_dir, data, tmp_path, stop_at, monkeypatch
):
    """With save_strategy=best, save_only_model and one kept checkpoint the run still resumes to the same weights."""
    output, _ = finished
    more = ["save_strategy=best", "save_only_model=true", "save_total_limit=1", "load_best_model_at_end=true"]
    recipe = load_recipe(None, run_settings(tiny_dir, data, tmp_path, *(f"training.{key}" for key in more)))
    stop_at(4)
    result = train_function(recipe)
    assert (result.steps, result.stopped_by) == (4, signal.SIGTERM)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    kept = [f"training.output_dir={tmp_path}", "training.resume_from_checkpoint=true"]
    result = train_function(load_recipe(tmp_path / "recipe.yaml", kept))
    assert (result.steps, result.stopped_by) == (6, None)
    losses = [
        {entry["step"]: entry["loss"] for entry in map(json.loads, text.splitlines()) if "loss" in entry}
        for text in ((folder / "trainer_log.jsonl").read_text() for folder in (output, tmp_path))
    ]
    assert losses[0] == losses[1]


def test_a_signal_in_the_last_step_changes_nothing_but_leaves_an_evaluation(tiny_dir, data, tmp_path, stop_at):
    stop_at(6)
    alone = run_settings(tiny_dir, data, tmp_path / "alone", "training.eval_strategy=no")
    result = train_function(load_recipe(None, alone))
    assert (result.steps, result.stopped_by) == (6, None)
    assert (tmp_path / "alone" / "model.safetensors").exists()
    evaluated = run_settings(tiny_dir, data, tmp_path / "evaluated")
    result = train_function(load_recipe(None, evaluated))
    assert (result.steps, result.stopped_by) == (6, signal.SIGTERM)
    assert last_checkpoint(tmp_path / "evaluated").name == "checkpoint-6"
    assert not (tmp_path / "evaluated" / "model.safetensors").exists()


def test_resuming_a_finished_run_trains_no_step_more(tiny_dir, data, tmp_path):
    """Steps that end within an epoch: the weights stay, bit by bit."""
    more = ["training.max_steps=5", "training.save_steps=5", "training.eval_strategy=no"]
    train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path, *more)))
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    again = run_settings(tiny_dir, data, tmp_path, *more, "training.resume_from_checkpoint=true")
    assert train_function(load_recipe(None, again)).steps == 5
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_resumed_run_goes_on_counting_its_patience(tiny_dir, data, tmp_path, stop_at, monkeypatch):
    """The best evaluation is at step 2; with a patience of 3 the run ends at step 8, interrupted or not."""
    more = [
        "training.eval_steps=2",
        "training.save_strategy=best",
        "training.learning_rate=3.0",
        "training.lr_scheduler_type=constant",
        "training.early_stopping_patience=3",
        "training.max_steps=40",
    ]
    whole = train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "whole", *more)))
    stop_at(whole.steps - 3)
    part = run_settings(tiny_dir, data, tmp_path / "part", *more)
    assert train_function(load_recipe(None, part)).stopped_by == signal.SIGTERM
    monkeypatch.undo()
    again = train_function(load_recipe(None, [*part, "training.resume_from_checkpoint=true"]))
    assert 3 < again.steps == whole.steps < 40


def test_prompts_that_do_not_fit_are_counted_and_not_asked(tiny_dir, data, tmp_path, caplog):
    """Training may cut a sample; a prompt is used whole or not at all."""
    records = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]
    records[1]["conversations"][0]["value"] = "<image>\n" + "what is it " * 60
    for record in records:
        record["image"] = str(data / record["image"])
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, records)))
    more = ("training.max_steps=1", f"data.val={tmp_path / 'val.jsonl'}", "template.truncation_strategy=left")
    asked = ("evaluation.run_after_training=true", "evaluation.max_new_tokens=2", "training.save_strategy=no")
    result = train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "run", *more, *asked)))
    assert result.metrics["exact_match_count"] == 2
    assert "1 of 3 prompts are longer than template.max_length and are not asked" in caplog.text


def test_questions_are_known_to_be_good_before_the_first_step(tiny_dir, data, tmp_path):
    """A question without an answer stops the run; one that is too long is left out, as in training."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "it is 1"}]
    long = [turns[0], {"from": "gpt", "value": "it is 1 " * 500}]
    records = [{"image": str(data / "0.png"), "conversations": conversation} for conversation in (turns, long)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = [f"evaluation.data={questions}", "evaluation.run_after_training=true", "training.max_steps=1"]
    result = train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "run", *more)))
    assert result.metrics["exact_match_count"] == 1
    with questions.open("a") as file:
        file.write(
            json.dumps({"image": str(data / "0.png"), "conversations": [*turns, {"from": "human", "value": "?"}]})
            + "\n"
        )
    with pytest.raises(DataError, match=r"questions.jsonl:3.*must end with the assistant's answer"):
        train_function(load_recipe(None, run_settings(tiny_dir, data, tmp_path / "none", *more)))
    assert not (tmp_path / "none").exists()


def test_padded_rows_run_the_vision_tower_without_images_too(tiny_dir, data, tmp_path):
    """Text alone, unpacked and padded, with a trained vision tower: the tower takes part, the losses are the same."""
    texts = tmp_path / "texts.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "nothing"}]
    texts.write_text(
        "".join(json.dumps({"conversations": [*turns, *turns][: 2 + 2 * (i % 2)]}) + "\n" for i in range(4))
    )
    logs = {}
    for free in ("true", "false"):
        output = tmp_path / free
        more = [f"data.train={texts}", "training.packing=false", f"training.padding_free={free}"]
        more += ["training.per_device_train_batch_size=2", "training.max_steps=2"]
        train_function(load_recipe(None, run_settings(tiny_dir, data, output, *more)))
        entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
        logs[free] = [entry["loss"] for entry in entries if "loss" in entry]
        assert not any("row_fill" in entry for entry in entries), "rows are not filled here"
    assert logs["true"] == pytest.approx(logs["false"], rel=1e-5)
