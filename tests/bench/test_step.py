"""`qwenvl-ft bench step` runs a real step and counts it correctly."""

import json

import pytest
import torch
import torch.distributed as dist
from rank_cases import in_ranks

from qwenvl_ft.bench.flops import Row, model_work
from qwenvl_ft.bench.lines import step_text
from qwenvl_ft.bench.sizes import bench_processor
from qwenvl_ft.bench.step import StepOptions, StepResult, bench_step
from qwenvl_ft.bench.workload import filled_records
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import BenchError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.training.trainer import QwenVLTrainer


def test_a_step_is_the_trainers_and_counts_the_models_inputs(monkeypatch, tmp_path):
    batches = []
    plain = QwenVLTrainer.training_step

    def seen(self, model, inputs, count=None):
        batches.append((inputs["input_ids"].numel(), int((inputs["labels"][:, 1:] != -100).sum())))
        return plain(self, model, inputs, count)

    monkeypatch.setattr(QwenVLTrainer, "training_step", seen)
    options = StepOptions(row_length=512, steps=2, warmup=1, checkpointing=False, profile=tmp_path / "trace")
    result, costs = bench_step(options)
    assert len(batches) == 1 + 2 + 2, "a step before the clock starts, two measured, two profiled"
    assert result.steps == 2
    assert result.tokens == sum(tokens for tokens, _ in batches[1:3])
    assert result.supervised_tokens == sum(count for _, count in batches[1:3])
    assert result.tokens > 0.8 * 2 * 512
    assert 0.15 < result.supervised_tokens / result.tokens < 0.35
    assert result.cpu_seconds > 0
    assert result.attention == "packed_sdpa"
    assert "aten::" in costs
    assert (tmp_path / "trace" / "trace.json.gz").stat().st_size > 1000
    assert f"{result.tokens_per_second:,.1f}" in step_text(result)


def test_the_command_prints_json_of_a_lora_step_with_a_setting_of_the_recipe(capsys):
    words = ["bench", "step", "--train-type", "lora", "--row-length", "256", "--steps", "1", "--warmup", "1", "--json"]
    assert main([*words, "--image-share", "0", "--attn-impl", "sdpa", "tuner.lora_rank=2"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["train_type"] == "lora"
    assert printed["attention"] == "sdpa"
    assert printed["tokens_per_second"] == pytest.approx(printed["tokens"] / printed["seconds"], abs=0.1)
    assert 0 < printed["mfu"] < 1


def test_the_command_measures_gated_delta_nets(capsys):
    words = ["--size", "qwen3.5-tiny", "--row-length", "256", "--steps", "1", "--warmup", "1", "--json"]
    assert main(["bench", "step", *words]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["model_flops"]["delta nets"] > 0
    assert printed["attention"] == "packed_sdpa"


def test_the_model_is_prepared_like_a_loaded_one(monkeypatch, tiny_dir):
    """Media are placed by the workers, or it would measure another path."""
    kept = []
    plain = QwenVLTrainer.train
    monkeypatch.setattr(
        QwenVLTrainer, "train", lambda self, **printed: (kept.append(self.model), plain(self, **printed))[1]
    )
    bench_step(StepOptions(row_length=256, steps=1, warmup=0, rows=1))
    bare = load_model(tiny_dir, torch_dtype="float32")
    assert MediaPlaces.of(kept[0]) is not None
    kinds = [{type(vars(m).get("forward")) for m in model.modules()} for model in (kept[0], bare)]
    assert kinds[1] <= kinds[0]


def test_padded_batches_count_no_padding(monkeypatch):
    """Nor does it hide the images, which a padded batch describes by their grids alone."""
    batches, grids = [], []
    plain = QwenVLTrainer.training_step

    def seen(self, model, inputs, count=None):
        grids.append(inputs["image_grid_thw"])
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        batches.append((inputs["input_ids"].numel(), int(inputs["attention_mask"].sum()), supervised))
        return plain(self, model, inputs, count)

    monkeypatch.setattr(QwenVLTrainer, "training_step", seen)
    settings = ("training.packing=false", "training.padding_free=false")
    result, _ = bench_step(StepOptions(row_length=256, rows=4, steps=2, warmup=1, settings=settings))
    assert result.tokens == sum(tokens for _, tokens, _ in batches[1:3])
    assert result.supervised_tokens == sum(supervised for _, _, supervised in batches[1:3])
    assert result.samples == 8
    assert result.supervised_tokens < result.tokens
    measured = torch.cat(grids[1:3])
    assert result.images == len(measured) > 0
    monkeypatch.undo()
    packed, _ = bench_step(StepOptions(row_length=256, rows=4, steps=2, warmup=1, settings=settings[:1]))
    assert packed.tokens == result.tokens, "vacuous: not the same samples"
    assert (packed.images, packed.model_flops) == (result.images, result.model_flops)
    assert any(slots > tokens for slots, tokens, _ in batches), "vacuous: no padding"


def test_accumulated_steps_have_full_rows_too():
    options = StepOptions(row_length=256, steps=2, warmup=1, settings=("training.gradient_accumulation_steps=4",))
    result, _ = bench_step(options)
    assert result.tokens > 0.8 * 2 * 4 * 256


def _shared():
    """Measure a step of rows that this rank shares with the others; return it, and what the whole rows hold."""
    seen, plain = [], QwenVLTrainer.training_step

    def step(self, model, inputs, count=None):
        frames = 4 * inputs["image_tokens"]
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        own = int((inputs["image_owners"] == dist.get_rank()).sum())
        seen.append((self, Row(inputs["cu_seq_lens_q"].diff().tolist(), frames.tolist(), supervised), own))
        return plain(self, model, inputs, count)

    QwenVLTrainer.training_step = step
    settings = (f"training.sequence_parallel_size={dist.get_world_size()}",)
    result, _ = bench_step(StepOptions(row_length=512, mean_sample=128, steps=2, warmup=1, settings=settings))
    rows = [row for _, row, _ in seen[1:3]]
    work = model_work(seen[0][0].model).flops(rows)
    return result.to_json(), rows, work, [own for *_, own in seen[1:3]]


@pytest.mark.distributed
def test_rows_that_ranks_share_are_counted_once():
    results = in_ranks(2, _shared)
    assert all(min(frames) > 0 for *_, frames in results), "vacuous: a rank runs no frame"
    for result, rows, work, _ in results:
        assert result["ranks"] == 2
        assert result["tokens"] == sum(row.tokens for row in rows) > 0.8 * 2 * 512
        assert result["supervised_tokens"] == sum(row.supervised for row in rows)
        assert result["images"] == sum(len(row.frames) for row in rows)
        assert result["samples"] == sum(len(row.samples) for row in rows)
        assert result["model_flops"] == work
        peak = result["peak_tflops"] * 1e12 * 2
        assert result["mfu"] == pytest.approx(work["total"] / result["seconds"] / peak, abs=1e-4)


def test_the_command_has_the_switch(capsys):
    assert main(["bench", "step", "--sequence-parallel-size", "2"]) == 2
    assert "training.sequence_parallel_size=2 lets 2 processes share each row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StepOptions(image_share=0.6, supervised_share=0.5), "add up to more than 1"),
        (
            StepOptions(train_type="lora", settings=("quantization.quantization_bit=4",)),
            "random weights are not quantised",
        ),
    ],
)
def test_options_that_the_benchmark_would_not_honour_are_refused(options, message):
    with pytest.raises(BenchError, match=message):
        bench_step(options)


def test_an_unknown_size_is_an_error_in_one_line(capsys):
    assert main(["bench", "step", "--size", "5b"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown size '5b'.")


def test_the_share_of_the_peak_is_needed_work_over_time():
    result = StepResult(
        *("cpu", "tiny", "full", "sdpa", "float32", 10, 2), 4.0, 3.0, [2000.0, 2000.0], *(20, 5, 1, 1), 1.0,
        {"text": int(1e12), "total": int(2e12)}, 1.0, "table",
    )  # fmt: skip
    assert result.mfu == 0.5
    assert result.to_json()["tflops_per_second"] == 0.5
    assert "MFU                         50.0%   text 50%" in step_text(result)


@pytest.mark.parametrize("image_share", [0.0, 0.5, 0.8])
def test_the_records_have_the_shares_that_were_asked_for(image_share):
    processor = bench_processor()
    sizes = {"tokens": 6000, "mean_sample": 400, "longest": 1000, "image_share": image_share, "supervised_share": 0.15}
    records = filled_records(processor.tokenizer, **sizes)
    samples = [Encoder(processor)(record) for record, _, _ in (records[i] for i in range(len(records)))]
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    images = sum(int(sample["image_grid_thw"].prod()) // 4 for sample in samples if "image_grid_thw" in sample)
    answers = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    assert tokens == pytest.approx(6000, rel=0.15)
    assert images / tokens == pytest.approx(image_share, abs=0.04)
    assert answers / tokens == pytest.approx(0.15, abs=0.04)
    assert torch.tensor([len(sample["input_ids"]) for sample in samples]).float().std() > 50, "all of one length"
