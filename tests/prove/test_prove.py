"""The proof passes for a correct library, and finds each fault that is injected into it."""

import json

import pytest
import torch
from cases import picture

from qwenvl_ft.checkpoint.weights_only import from_weights_only
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.prove import capacity
from qwenvl_ft.prove.exact_reference import measure_alone, measure_reference
from qwenvl_ft.prove.packed import leaking
from qwenvl_ft.prove.proof_recipe import ProofOptions, first_phase, proof_recipe, recipe_from_words
from qwenvl_ft.prove.run import prove
from qwenvl_ft.prove.subject import build_subject
from qwenvl_ft.prove.table import FAILED, OK, SKIPPED, UNCLEAR, Report, Row
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.upstream import delta_net

FEW = {"samples": 3, "steps": 1, "new_tokens": 4}


def proven(folder, *words, **options):
    return prove(recipe_from_words(["--model", str(folder), *words]), ProofOptions(**(FEW | options)))


def verdicts(report):
    """Check -> the worst verdict of its rows."""
    worst = {}
    for row in report.rows:
        if row.verdict != OK:
            worst[row.check] = row.verdict
        worst.setdefault(row.check, OK)
    return worst


@pytest.mark.soak
def test_lora_in_float32_matches_plain_transformers_and_peft(tiny_dir):
    report = proven(tiny_dir, "model.torch_dtype=float32", samples=5, new_tokens=8)
    assert report.ok, report.text()
    found = verdicts(report)
    assert set(found) == {
        "frozen bits",
        "trained weights",
        "packed = alone",
        "loss of any split",
        "generation",
        "saved adapter",
        "merged model",
    }
    assert set(found.values()) == {OK}
    figures = [row.figure for row in report.rows if isinstance(row.figure, float)]
    assert len(figures) == 8
    assert max(figures) < 5e-6
    assert all(row.fault > 1e3 * row.tolerance for row in report.rows if isinstance(row.fault, float))
    assert [row.figure for row in report.rows if row.compared.startswith("answers")] == ["40 of 40 the same"] * 2
    assert "generated records" in report.facts["data"]


@pytest.mark.soak
def test_all_weights_of_a_mixture_of_experts_in_16_bits(checkpoints):
    words = ["tuner.train_type=full", "tuner.freeze_vit=false", "tuner.freeze_aligner=false"]
    report = proven(checkpoints["moe"], *words, samples=5, skip=("saved",))
    assert report.ok, report.text()
    rows = {row.compared.split(" in a packed")[0]: row for row in report.rows}
    assert 1e-4 < rows["logits"].figure < rows["logits"].tolerance < rows["logits"].fault
    assert {row.compared.partition(":")[0] for row in report.rows if row.check == "trained weights"} == {
        "vision",
        "merger",
        "llm",
    }
    assert "float32" in report.facts["reference"]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_gated_delta_nets_are_proven_and_their_leak_is_found(checkpoints, monkeypatch, kind):
    words = (checkpoints[kind], "model.torch_dtype=float32")
    report = proven(*words)
    assert report.ok, report.text()
    monkeypatch.setattr(delta_net._Restarting, "_fold", lambda self, mixer, hidden: None)
    report = proven(*words, skip=("saved", "split"))
    assert {row.verdict for row in report.rows if row.check == "packed = alone"} == {FAILED}


@pytest.mark.soak
def test_answers_of_one_length_get_a_generated_record_that_exposes_a_mean_of_means(tiny_dir, write_jsonl):
    turns = [{"from": "human", "value": "Yes or no?"}, {"from": "gpt", "value": "yes"}]
    data = write_jsonl([{"conversations": turns, "id": f"{k}"} for k in range(4)])
    report = proven(tiny_dir, "model.torch_dtype=float32", f"data.train={data}", skip=("saved",))
    assert verdicts(report)["loss of any split"] == OK, report.text()
    assert "a generated one because these have answers of one length" in report.facts["data"]


@pytest.mark.soak
def test_an_adapter_that_plain_peft_does_not_know_is_loaded_by_us_and_a_row_says_so(tiny_dir):
    report = proven(tiny_dir, "tuner.train_type=reft", "model.torch_dtype=float32")
    assert report.ok, report.text()
    skipped = [row for row in report.rows if row.verdict == SKIPPED]
    assert ["plain peft does not know" in row.note for row in skipped] == [True, False]
    assert "changes no weight" in skipped[1].note
    (logits,) = [row for row in report.rows if row.check == "saved adapter" and row.compared.startswith("logits")]
    assert "load_model" in logits.compared
    assert logits.figure < logits.tolerance < logits.fault


SHARED = {
    "rows": ["training.sequence_parallel_size=2"],
    "weights": ["training.fsdp=full_shard", "training.parallelism_config={dp_shard_size: 2, dp_replicate_size: 2}"],
    "nothing but weights": ["training.resume_from_checkpoint=old", "training.resume_weights_only=true"],
}


@pytest.mark.parametrize("case", SHARED)
def test_a_recipe_of_several_processes_is_proven_in_one(tiny_dir, tmp_path, case):
    words = ["--model", str(tiny_dir), "training.use_cpu=true", "model.torch_dtype=float32", *SHARED[case]]
    recipe, left_out = first_phase(recipe_from_words(words))
    assert any("sequence_parallel_size=2 is left out" in line for line in left_out) == (case == "rows")
    proof = proof_recipe(recipe, 1, tmp_path)
    assert prepare_run(proof).parallelism_config is None
    assert from_weights_only(proof) is proof, "it would start from another model than the recipe names"


@pytest.mark.parametrize("attention", ["sdpa", "packed_sdpa"])
def test_a_leak_is_found(tiny_dir, monkeypatch, attention):
    """A mask of ones, every trainer's default, lets each sample attend to those before it.

    ``packed_sdpa`` uses the boundaries in the batch whatever the mask, so there the boundaries are removed too.
    """
    sound = QwenVLCollator.__call__

    def leaking_row(self, samples):
        batch = sound(self, samples)
        if attention == "packed_sdpa":
            return leaking(batch)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(QwenVLCollator, "__call__", leaking_row)
    report = proven(tiny_dir, f"model.attn_impl={attention}", skip=("saved", "split"))
    assert {row.verdict for row in report.rows if row.check == "packed = alone"} == {FAILED}
    assert not report.ok


def test_a_mean_of_means_is_found(tiny_dir, monkeypatch):
    sound = QwenVLTrainer.training_step

    def of_means(self, model, inputs, num_items_in_batch=None):
        own = (inputs["labels"][:, 1:] != -100).sum() * self.args.gradient_accumulation_steps
        return sound(self, model, inputs, own)

    monkeypatch.setattr(QwenVLTrainer, "training_step", of_means)
    report = proven(tiny_dir, skip=("saved", "packed"))
    assert verdicts(report)["loss of any split"] == FAILED
    assert verdicts(report)["frozen bits"] == OK


def test_a_frozen_part_that_moves_by_one_bit_is_found(tiny_dir, monkeypatch):
    sound = QwenVLTrainer.training_step

    def moving(self, model, *arguments, **options):
        loss = sound(self, model, *arguments, **options)
        weight = dict(model.named_parameters())["base_model.model.model.visual.merger.norm.weight"]
        bits = weight.data.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)
        bits[3] += 1
        return loss

    monkeypatch.setattr(QwenVLTrainer, "training_step", moving)
    report = proven(tiny_dir, skip=("saved", "split", "packed"))
    assert {row.compared.partition(":")[0]: row.verdict for row in report.rows if row.check == "frozen bits"} == {
        "vision": OK,
        "merger": FAILED,
        "llm": OK,
    }
    assert any("visual.merger.norm.weight" in row.note for row in report.rows)


def test_a_part_that_should_train_and_does_not_is_found(tiny_dir, monkeypatch):
    """Its weights have gradients, but the optimizer does not update them."""
    sound = QwenVLTrainer.create_optimizer

    def forgetful(self, *arguments):
        optimizer = sound(self, *arguments)
        merger = {id(value) for name, value in self.model.named_parameters() if "merger" in name}
        for group in optimizer.param_groups:
            group["params"] = [value for value in group["params"] if id(value) not in merger]
        return optimizer

    monkeypatch.setattr(QwenVLTrainer, "create_optimizer", forgetful)
    report = proven(tiny_dir, "tuner.freeze_aligner=false", skip=("saved", "split", "packed"))
    rows = {row.compared.partition(":")[0]: row for row in report.rows if row.check == "trained weights"}
    assert (rows["merger"].verdict, rows["llm"].verdict) == (FAILED, OK)
    assert "gradients, but no change" in rows["merger"].note


@pytest.mark.soak
def test_a_merged_model_with_a_wrong_scale_is_found(tiny_dir, monkeypatch):
    from peft.tuners.lora.layer import Linear

    sound = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.5 * sound(self, adapter))
    report = proven(tiny_dir, skip=("split", "packed"))
    assert verdicts(report)["merged model"] == FAILED
    assert verdicts(report)["saved adapter"] == OK


def test_the_reference_of_16_bits_is_the_same_weights_in_plain_transformers_in_float32(tiny_dir, tmp_path):
    from transformers import AutoModelForImageTextToText

    recipe, _ = first_phase(recipe_from_words(["--model", str(tiny_dir)]))
    options = ProofOptions(samples=4)
    subject = build_subject(proof_recipe(recipe, 1, tmp_path / "run"), options, tmp_path, lambda line: None)
    measure_alone(subject)
    measure_reference(subject)
    plain = AutoModelForImageTextToText.from_pretrained(tiny_dir, dtype=torch.bfloat16).float()
    for k, sample in enumerate(subject.samples):
        batch = QwenVLCollator()([Encoder(subject.processor)(subject.dataset.conversation(k))])
        inputs = {key: batch[key] for key in ("input_ids", "pixel_values", "image_grid_thw") if key in batch}
        inputs["position_ids"] = batch["position_ids"]
        with torch.no_grad():
            logits = plain(**inputs, use_cache=False).logits[0, :-1][sample["labels"][1:] != -100]
        torch.testing.assert_close(subject.reference.logits[k], logits, rtol=1e-5, atol=1e-5)
    assert subject.noise("logits") > 1e-4, "vacuous: the run is as exact as its reference"


def test_without_memory_for_float32_another_attention_is_the_reference(tiny_dir, monkeypatch):
    monkeypatch.setattr(capacity, "free_memory", lambda device: 0)
    report = proven(tiny_dir, skip=("saved", "split"))
    assert report.ok, report.text()
    assert "eager attention in 16 bits" in report.facts["reference"]
    assert any("are free" in line for line in report.warnings)


def test_training_continues_at_a_higher_rate_until_the_logits_change(tiny_dir):
    words = ("model.torch_dtype=float32", "training.learning_rate=1e-7")
    report = proven(tiny_dir, *words, skip=("saved", "split", "packed"))
    assert report.facts["training"].startswith("steps at the rate: 1 at 1e-07, then 1 at 1e-06")


def test_the_command_proves_on_real_records_and_prints_one_object(tiny_dir, tmp_path, write_jsonl, capsys):
    for name, size in {"a": (96, 64), "b": (64, 128)}.items():
        picture(*size).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It is said, at some length."}]
    shown = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A blur."}]
    both = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
    records = [{"conversations": turns}] * 9
    records += [{"image": ["a.png"], "conversations": shown}, {"image": ["a.png", "b.png"], "conversations": both}]
    words = ["prove", "--model", str(tiny_dir), "--data", str(write_jsonl(records)), "--tuner", "lora"]
    few = ["--samples", "3", "--steps", "1", "--skip", "saved", "--skip", "split", "--json"]
    assert main([*words, *few, "model.torch_dtype=float32"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"]
    assert "3 samples" in printed["facts"]["data"]
    assert "transformers" in printed["facts"]["versions"]
    assert {row["check"] for row in printed["rows"]} == {"frozen bits", "trained weights", "packed = alone"}
    (gradients,) = [row for row in printed["rows"] if row["compared"].startswith("gradients")]
    assert gradients["figure"] <= gradients["tolerance"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a model or a recipe"),
        (["--model", "nowhere/at/all"], "no such model directory"),
        (["--model", "TINY", "--tuner", "lorra"], "train_type"),
        (["--model", "TINY", "--samples", "1"], "--samples 1 is too few"),
        (["--model", "TINY", "--skip", "packing"], "Did you mean 'packed'"),
        (["--model", "TINY", "--folder", "/no/such"], "is not a folder"),
        (["--model", "TINY", "--data", "no.jsonl"], "do not find no.jsonl: there is no such file"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(tiny_dir, capsys, words, message):
    assert main(["prove", *[str(tiny_dir) if word == "TINY" else word for word in words]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_report_that_compared_nothing_or_could_not_have_failed_is_not_proven():
    assert not Report(facts={}).ok
    good = Row.judged("a", "b", figure=0.1, tolerance=0.2, fault=0.3)
    assert Report(facts={}, rows=[good]).ok
    assert Row.judged("a", "b", figure=0.1, tolerance=0.2, fault=0.15).verdict == UNCLEAR
    assert Row.judged("a", "b", figure=float("nan"), tolerance=0.2).verdict == FAILED
    report = Report(facts={"model": "m"}, rows=[good, Row.judged("c", "d", figure=0.3, tolerance=0.2)])
    assert not report.ok
    assert "NOT PROVEN: c" in report.text()
    assert max(map(len, report.text().splitlines())) <= 120
