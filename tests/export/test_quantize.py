"""Quantising by GPTQ and AWQ: the calls to gptqmodel, and the errors before them."""

import json
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError, DataError
from qwenvl_ft.export import quantize as module
from qwenvl_ft.export.quantize import calibration
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.quantization import is_linear, quantized_modules, use_trainable_kernels
from qwenvl_ft.model.tiny import make_tiny


@pytest.fixture
def records(tmp_path, mixed_records):
    """Twelve conversations, three of them with a video."""
    lines = []
    for i in range(12):
        Image.new("RGB", (64 + i, 64), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
        medium = {"video": [[f"{i}.png"] * 4]} if i % 4 == 3 else {"image": f"{i}.png"}
        turns = [{"from": "human", "value": "<video>x" if "video" in medium else "<image>\nx"}]
        lines.append(medium | {"conversations": [*turns, {"from": "gpt", "value": f"number {i}"}]})
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_it_is_calibrated_on_conversations_as_training_reads_them(records, processor):
    samples = calibration(records, 5, seed=0)
    assert len(samples) == 5
    assert samples != calibration(records, 5, seed=1)
    for messages in samples:
        number = int(messages[1]["content"][0]["text"].removeprefix("number "))
        image = messages[0]["content"][0]["image"]
        assert image.size == (64 + number, 64)
        text = [
            {**m, "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]} for m in messages
        ]
        ids = processor.apply_chat_template(text, tokenize=False)
        assert ids.count("<|image_pad|>") == 1
        record = {"image": image, "conversations": [{"from": "human", "value": "<image>\nx"}]}
        record["conversations"].append({"from": "gpt", "value": f"number {number}"})
        sample = Encoder(processor)(record)
        inputs = processor(text=[ids], images=[image], return_tensors="pt")
        assert torch.equal(inputs["input_ids"][0], sample["input_ids"])


def test_videos_are_skipped_and_too_few_samples_are_logged(records, tmp_path, caplog):
    samples = calibration(records, 100, seed=0)
    assert len(samples) == 9
    assert "calibrating on 9 samples" in caplog.text
    assert "(3 with videos)" in caplog.text
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "videos.jsonl").write_text("\n".join(line for line in lines if "video" in line))
    with pytest.raises(DataError, match="only records with videos"):
        calibration(str(tmp_path / "videos.jsonl"), 4, seed=0)


REFUSED = {
    "an unknown method": (["--quant-method", "gtpq"], "Did you mean 'gptq'?"),
    "bits of the other": (["--quant_method", "awq", "--quant_bits", "8"], "--quant-bits=8 is not supported by"),
    "no samples": (["--quant_method", "gptq"], "--dataset my.jsonl"),
    "a group of another size": (
        ["--quant_method", "gptq", "--gptq_group_size", "128", "--dataset", "x"],
        "--group-size=128 does not divide the model's hidden_size of 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(tiny_dir, tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr(module, "find_spec", lambda name: "there")
    words, match = REFUSED[case]
    assert main(["merge", str(tiny_dir), str(tmp_path / "new"), *words]) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_awq_of_a_model_whose_heads_are_too_small_is_one_line(tiny_dir, tmp_path, capsys, monkeypatch):
    """The tiny model's two heads for keys and values have 16 outputs each."""
    monkeypatch.setattr(module, "find_spec", lambda name: "there")
    words = ["--quant-method", "awq", "--group-size", "32", "--dataset", "x"]
    assert main(["merge", str(tiny_dir), str(tmp_path / "new"), *words]) == 2
    error = capsys.readouterr().err
    assert "blocks of 64, but the model's key and value heads have 32 outputs. Use --quant-method=gptq." in error
    module._require_awq_outputs(str(make_tiny(tmp_path / "wide", head_dim=32)))


@pytest.mark.parametrize(("method", "kernel"), [("gptq", "gptq_torch"), ("awq", "torch_awq")])
def test_a_checkpoint_is_loaded_with_kernels_that_can_train_where_there_is_no_gpu(method, kernel, monkeypatch):
    def chosen(gpu=False, **more):
        config = SimpleNamespace(quantization_config={"quant_method": method, "bits": 4, **more})
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        use_trainable_kernels(config)
        return config.quantization_config.get("backend")

    assert chosen() == chosen(backend="auto") == kernel
    assert chosen(backend="marlin") == "marlin"
    assert chosen(gpu=True) is None
    plain = SimpleNamespace()
    use_trainable_kernels(plain)
    assert vars(plain) == {}


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is here")
def test_without_gptqmodel_the_error_gives_the_command_to_install_it(tiny_dir, tmp_path, capsys):
    assert main(["merge", str(tiny_dir), str(tmp_path / "new"), "--quant-method", "gptq", "--dataset", "x"]) == 2
    assert "needs gptqmodel. Run" in capsys.readouterr().err
    assert "gptqmodel" not in sys.modules


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is here")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_that_needs_gptqmodel_says_so(tiny_dir, tmp_path, method):
    shutil.copytree(tiny_dir, tmp_path / "few")
    config = json.loads((tiny_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "few" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised by {method}, which needs gptqmodel.*pip install"):
        load_model(tmp_path / "few")


def test_a_quantised_model_is_not_quantised_again(tiny_dir, tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from qwenvl_ft.recipe.schema import QuantizationConfig

    quantization = QuantizationConfig(quantization_bit=4)
    load_model(tiny_dir, torch_dtype="float32", quantization=quantization).save_pretrained(tmp_path / "few")
    monkeypatch.setattr(module, "find_spec", lambda name: "there")
    words = ["--quant-method", "awq", "--dataset", "x"]
    assert main(["merge", str(tmp_path / "few"), str(tmp_path / "new"), *words]) == 2
    assert "is quantised already" in capsys.readouterr().err


def test_layers_that_are_no_subclass_of_linear_are_targets():
    """A layer like GPTQ's: a buffer of packed integers, and no tensor as weight."""
    layer = torch.nn.Module()
    layer.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    layer.weight = object()
    model = torch.nn.ModuleDict({"packed": layer, "plain": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2)})
    assert quantized_modules(model) == ["packed"]
    assert [name for name, inner in model.named_modules() if is_linear(inner)] == ["packed", "plain"]


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_written_model_is_near_the_whole_one_and_takes_lora(records, tmp_path, method):
    pytest.importorskip("gptqmodel")
    tiny_dir = tmp_path / "whole"
    make_tiny(tiny_dir, head_dim=32)  # AWQ takes outputs by 64
    from qwenvl_ft.recipe.schema import TunerConfig
    from qwenvl_ft.tuning.prepare import prepare_model

    words = ["--quant-method", method, "--group-size", "32", "--n-samples", "8", "--dataset", records]
    assert main(["merge", str(tiny_dir), str(tmp_path / "new"), *words]) == 0
    model = load_model(tmp_path / "new", torch_dtype="float32", attn_impl="sdpa").eval()
    assert len(quantized_modules(model)) == 28
    ids = torch.arange(40)[None]
    with torch.no_grad():
        whole = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa")(input_ids=ids).logits
        assert 0 < (model(input_ids=ids).logits - whole).abs().mean() < whole.abs().mean() / 2
    prepared = prepare_model(model, TunerConfig(lora_dropout=0.0)).train()
    optimizer = torch.optim.AdamW([value for value in prepared.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        logits = prepared(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
