"""The other benchmarks: each figure is compared with one computed in another way."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from qwenvl_ft.bench.data import bench_data
from qwenvl_ft.bench.fit import fitted, keep, row_shapes
from qwenvl_ft.bench.growth import grow_records, label_heights, plot_records
from qwenvl_ft.bench.memory import FUSED, _prepared, first_layers, kept, kept_by_text_layers, memory
from qwenvl_ft.bench.parts import bench_attention
from qwenvl_ft.bench.sizes import bench_processor
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.plan.costs import CostModel, costs_file, machine_costs
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.errors import BenchError, DataError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.upstream.attention import set_attention


def test_the_data_path_is_measured_beside_its_floor(tmp_path):
    result = bench_data(bench_processor(max_pixels=65536), records=16).to_json()
    assert result["records"] == 16
    assert result["images"] > 5
    assert result["bytes_per_image"] == pytest.approx(result["processor_bytes_per_image"] / 8)
    assert 0.75 < result["bytes_per_image"] / (65536 * 3) <= 1, "a byte a channel of each pixel"
    assert result["encode_seconds"] > result["floor_seconds"] > 0
    assert result["plan_again_seconds"] < result["plan_seconds"]


def test_text_alone_has_no_floor(tmp_path):
    path = tmp_path / "text.jsonl"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path.write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(9)))
    with pytest.raises(DataError, match="no record has an image"):
        bench_data(bench_processor(), path, records=8)


def test_the_loss_in_chunks_is_the_plain_one_in_less_memory(capsys):
    words = ["--tokens", "4096", "--vocabulary", "20000", "--width", "16", "--json"]
    assert main(["bench", "loss", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["chunked"]["loss"] == pytest.approx(result["plain"]["loss"], rel=1e-5)
    assert result["chunked"]["gradient"] == pytest.approx(result["plain"]["gradient"], rel=1e-5)
    logits = 4096 * 20000 * 4 / 2**30
    assert result["plain"]["gib"] > 1.8 * logits, "logits and their gradient"
    assert result["chunked"]["gib"] < 0.5 * result["plain"]["gib"]


def test_more_samples_than_tokens_are_refused():
    with pytest.raises(BenchError, match="64 samples do not fit into a row of 32 tokens"):
        bench_attention(tokens=32, samples=64)


def test_attention_is_the_same_both_ways():
    result = bench_attention(tokens=512, samples=8, heads=4, kv_heads=2, size=16, rounds=1)
    assert result["largest_difference"] < 1e-5
    assert result["times_faster"] == result["block_mask"] / result["per_sample"]


def test_saved_activations_are_counted_as_on_a_real_device(tiny_model):
    layer = tiny_model.model.language_model.layers[0].train()
    counted = {}
    for device, attention in (("cpu", "sdpa"), ("meta", FUSED)):
        layer.self_attn.config._attn_implementation = attention
        hidden, angles = torch.zeros(1, 40, 64, device=device), torch.zeros(1, 40, 16, device=device)
        counted[device] = kept(layer.to(device), hidden, position_embeddings=(angles, angles))
    assert counted["cpu"] == pytest.approx(counted["meta"], rel=0.05)
    assert counted["meta"] > 10 * 40 * 64 * 4, "vacuous: hardly more than the input"


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_both_kinds_of_layers_are_counted_as_on_a_real_device(checkpoints, kind):
    model = load_model(str(checkpoints[kind]), torch_dtype="float32", attn_impl="sdpa").train()
    if kind.endswith("moe"):
        model.set_experts_implementation("grouped_mm")
    text = model.model.language_model
    first = first_layers(text.config)
    assert first == {"linear_attention": 0, "full_attention": 3}
    measured = {}
    for name, number in first.items():
        hidden, angles = torch.zeros(1, 200, 64), torch.zeros(1, 200, 8)
        measured[name] = kept(text.layers[number], hidden, position_embeddings=(angles, angles))
    set_attention(text.config, FUSED)
    counted = kept_by_text_layers(model.to("meta"), 200)
    for name, size in measured.items():
        assert counted[name] == pytest.approx(size, rel=0.05), name
    assert counted["linear_attention"] > 1.3 * counted["full_attention"], "vacuous: one kind would do"


def test_the_larger_kind_of_layer_is_the_one_that_counts():
    found = memory("qwen3.5-tiny", "lora", 4096)
    kinds = kept_by_text_layers(_prepared("qwen3.5-tiny", "lora"), 4096)
    assert found.layer == pytest.approx(2 * max(kinds.values()) / 2**30)
    assert found.layer > 1.3 * 2 * min(kinds.values()) / 2**30, "vacuous: both are equal"
    assert found.checkpoints == pytest.approx(4 * 4096 * 64 * 2 / 2**30)


def test_memory_follows_from_the_number_of_weights():
    full, lora = (memory("2b", train_type, 4096) for train_type in ("full", "lora"))
    weights = 2_127_532_032
    assert full.weights == pytest.approx(4 * weights / 2**30)
    assert full.optimizer == 2 * full.weights
    assert lora.total < full.total / 3
    assert lora.weights == pytest.approx(2 * weights / 2**30, rel=0.05)
    longer = memory("2b", "full", 8192)
    assert longer.checkpoints == pytest.approx(2 * full.checkpoints)
    assert longer.layer == pytest.approx(2 * full.layer, rel=0.01)


def test_a_fit_recovers_the_costs_behind_the_times():
    rows = [(shape, shape.samples) for shape in row_shapes(4096)]
    lengths, patches = ([getattr(m, n) for m, _ in rows] for n in ("tokens", "image"))
    counts, tokens, seen = np.array([n for _, n in rows]), np.array(lengths), 4 * np.array(patches)
    features = np.stack([counts * tokens, counts * seen, counts * tokens**2, counts * seen**2], axis=1).astype(float)
    true = np.array([2e-5, 1e-5, 3e-9, 2e-9])
    costs, explained = fitted(features, features @ true + 0.01)
    assert [costs.patch, costs.token_square, costs.patch_square] == pytest.approx(true[1:] / true[0])
    assert explained == pytest.approx(1)
    costs, _ = fitted(features, features[:, 0] * 1e-5 - features[:, 3] * 1e-12)
    assert costs.patch_square == 0, "no cost is negative"


def test_plans_follow_the_machines_fit(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert machine_costs() == CostModel()
    with pytest.raises(BenchError, match="explains 50%"):
        keep(CostModel(), 0.5)
    costs = CostModel(patch=3.0, token_square=0.5, patch_square=0.0)
    assert keep(costs, 0.99) == costs_file()
    assert machine_costs() == costs
    assert costs.of([2, 10], [4, 0]).tolist() == [2 + 12 + 2, 10 + 50]
    costs_file().write_text('{"patches": 1}')
    with pytest.raises(DataError, match="is not a cost model"):
        machine_costs()


def test_ranks_are_balanced_by_the_given_costs(encoder, tmp_path):
    from cases import ListRecords, answers_of

    dataset = SampleDataset(ListRecords(answers_of(*range(1, 17))), encoder, cache_dir=tmp_path)
    plain, other = (
        PlanSampler(dataset, RunShape(2, 1, 2), packing=False, max_length=500, costs=costs).plan(0)
        for costs in (CostModel(), CostModel(patch=1e3))
    )
    assert plain != other
    samples = [sorted(i for ranks in plan for batch in ranks for i in batch) for plan in (plain, other)]
    assert samples[0] == samples[1] == list(range(16))


def test_names_of_lines_do_not_overlap():
    assert label_heights([100, 50, 104, 300]) == [100, 50, 115, 300]


def test_growth_is_measured_and_drawn():
    result = list(grow_records((20, 60), images=2))
    assert [entry["records"] for entry in result] == [20, 60]
    assert result[1]["measure"] > result[1]["start again"]
    drawn = ElementTree.fromstring(plot_records(result))
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * 4
    assert all(80 <= float(c.get("cx")) <= 600 and 50 <= float(c.get("cy")) <= 350 for c in circles)
