"""`inspect` counts the weights of a checkpoint by part, and names the library that opens it."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.contents import as_text, read_contents
from qwenvl_ft.export.rank_lines import rank_lines
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model

ALL = {"freeze_vit": False, "freeze_aligner": False, "lora_rank": 4}


def saved(folder, checkpoint, **settings):
    torch.manual_seed(0)
    prepare_model(load_model(checkpoint, torch_dtype="float32"), TunerConfig(**settings)).save_pretrained(folder)
    return folder


def by_hand(tensors, *words, but=()):
    """Count the tensors whose name contains one of ``words``."""
    chosen = [v for k, v in tensors.items() if any(w in k for w in words) and not any(w in k for w in but)]
    return {
        "tensors": len(chosen),
        "parameters": sum(value.numel() for value in chosen),
        "mib": pytest.approx(sum(value.numel() * value.element_size() for value in chosen) / 2**20, abs=1e-3),
        "norm": pytest.approx(math.sqrt(sum(float((value.double() ** 2).sum()) for value in chosen))),
    }


def test_weights_are_counted_by_part_and_full_copies_by_themselves(checkpoints, tmp_path):
    merger = "model.visual.merger"
    folder = saved(tmp_path, checkpoints["dense"], **ALL, modules_to_save=[merger], rank_pattern={"q_proj": 2})
    found, tensors = read_contents(folder), load_file(folder / "adapter_model.safetensors")
    assert found.weights == {
        "vision": by_hand(tensors, ".blocks."),
        "merger": by_hand(tensors, "deepstack"),
        "llm": by_hand(tensors, "language_model"),
    }
    assert found.in_full == {"merger": by_hand(tensors, "visual.merger")}
    assert (found.kind, found.method, found.base) == ("adapter", "LORA", str(checkpoints["dense"]))
    assert found.modules_to_save == [merger]
    assert found.ranks == {2: 4, 4: 46}
    assert "plain peft" in found.loads
    text = as_text(found)
    assert "ranks: 2 in 4 layers, 4 in 46 layers" in text
    assert "merger, in full" in text
    peft.PeftModel.from_pretrained(load_model(checkpoints["dense"], torch_dtype="float32"), folder)


def test_ranks_over_experts_are_those_of_one(checkpoints, tmp_path):
    folder = saved(tmp_path, checkpoints["moe"], **ALL)
    weights = load_file(folder / "adapter_model.safetensors")
    stacked = {value.shape[0] for name, value in weights.items() if name.endswith("lora_A.weight")}
    assert len(stacked) == 2, "vacuous: no experts"
    assert set(read_contents(folder).ranks) == {4}
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "far/away"}))
    assert set(read_contents(folder).ranks) == {4}


def test_the_language_head_of_a_model_is_a_row_of_its_own(checkpoints):
    for kind in ("dense", "moe"):
        found, tensors = read_contents(checkpoints[kind]), load_file(checkpoints[kind] / "model.safetensors")
        assert found.weights["llm"] == by_hand(tensors, "language_model")
        assert found.weights["merger"] == by_hand(tensors, "merger")
        assert found.weights["vision"] == by_hand(tensors, "visual", but=("merger",))
        assert ("head" in found.weights) == ("lm_head.weight" in tensors)
        assert sum(count["tensors"] for count in found.weights.values()) == len(tensors)
        assert (found.kind, found.loads, found.base) == ("model", "plain transformers", None)
        disk = sum(path.stat().st_size for path in checkpoints[kind].iterdir())
        assert sum(found.files_mib.values()) == pytest.approx(disk / 2**20, abs=0.01)


def test_ranks_of_adalora_are_those_that_are_left(checkpoints, tmp_path):
    model = load_model(checkpoints["dense"], torch_dtype="float32")
    settings = TunerConfig(train_type="adalora", adalora_init_r=6, adalora_target_r=2)
    prepared = prepare_model(model, settings)
    with torch.no_grad():
        for number, (_, value) in enumerate((k, v) for k, v in prepared.named_parameters() if ".lora_E." in k):
            value.copy_((torch.arange(6)[:, None] < 1 + number % 5).float())
    prepared.save_pretrained(tmp_path)
    found = read_contents(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    kept = [sum(mask) for mask in pattern.values()]
    assert found.ranks == {rank: kept.count(rank) for rank in sorted(set(kept))}
    assert set(found.ranks) == {1, 2, 3, 4, 5}
    by_layer = {name.removeprefix("base_model.model.").removesuffix(".lora_E"): sum(m) for name, m in pattern.items()}
    assert found.ranks_by_layer == by_layer


def test_the_ranks_of_layers_are_written_by_kind_and_by_number():
    q, fc = "model.language_model.layers.{}.self_attn.q_proj", "model.visual.deepstack_merger_list.{}.linear_fc1"
    ranks = {q.format(k): 4 if k in (0, 1, 2, 6) else 3 for k in (*range(7), 10)}
    ranks |= {"model.visual.merger.linear_fc1": 12, fc.format(0): 9, fc.format(1): 16, fc.format(2): 9}
    assert rank_lines(ranks) == [
        "  model.language_model.layers.*.self_attn.q_proj: 4 in 0-2, 6; 3 in 3-5, 10",
        "  model.visual.deepstack_merger_list.*.linear_fc1: 16 in 1; 9 in 0, 2",
        "  model.visual.merger.linear_fc1: 12",
    ]


def test_the_command_says_which_layer_has_which_rank(checkpoints, tmp_path, capsys):
    folder = saved(tmp_path, checkpoints["dense"], **ALL, rank_pattern={r"layers.1.self_attn.q_proj": 2})
    assert main(["inspect", str(folder)]) == 0
    assert "  model.language_model.layers.*.self_attn.q_proj: 4 in 0" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["ranks_by_layer"]
    assert [name for name, rank in listed.items() if rank == 2] == ["model.language_model.layers.1.self_attn.q_proj"]
    assert main(["inspect", str(saved(tmp_path / "same", checkpoints["dense"], **ALL))]) == 0
    assert ".q_proj: 4" not in capsys.readouterr().out, "one rank for all needs no list"


@pytest.mark.parametrize(("train_type", "opener"), [("adapter", "cannot be merged"), ("vera", "plain peft")])
def test_it_names_the_library_that_opens_the_checkpoint(checkpoints, tmp_path, train_type, opener):
    found = read_contents(saved(tmp_path, checkpoints["dense"], train_type=train_type))
    assert opener in found.loads
    assert ("shared" in found.weights) == (train_type == "vera")
    assert not found.in_full


def test_keys_are_listed_with_shape_and_norm_from_old_files_too(checkpoints, tmp_path, capsys):
    folder = saved(tmp_path / "new", checkpoints["dense"], **ALL)
    tensors = load_file(folder / "adapter_model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    torch.save(tensors, old / "adapter_model.bin")
    for where in (folder, old):
        assert main(["inspect", str(where), "--keys", "merger", "--json"]) == 0
        keys = json.loads(capsys.readouterr().out)["keys"]
        expected = {key: value for key, value in tensors.items() if "merger" in key}
        assert {name: tuple(shape) for name, shape, _, _ in keys} == {k: tuple(v.shape) for k, v in expected.items()}
        assert all(norm == pytest.approx(float(expected[name].norm()), rel=1e-5) for name, _, _, norm in keys)
        assert len(keys) == 16
    assert main(["inspect", str(folder), "--keys", "merge_r"]) == 2
    assert "no weight" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_one_line(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither adapter_config.json nor config.json"):
        read_contents(tmp_path)
    folder = saved(tmp_path / "checkpoint-3", checkpoints["dense"])
    with pytest.raises(CheckpointError, match=r"Did you mean .*checkpoint-3"):
        read_contents(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged"):
        read_contents(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_contents(folder)
