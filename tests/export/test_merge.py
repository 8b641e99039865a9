"""A merged model, opened by plain transformers in another process, generates what the adapter on its base does."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.encode.draft import ENCLOSED_VIDEO, VIDEO_PAD
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.merge import merge
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model

ALL = {"freeze_llm": False, "freeze_vit": False, "freeze_aligner": False, "lora_rank": 4}
MERGERS = ["model.visual.merger", "model.visual.deepstack_merger_list"]
LINEARS = r".*(q_proj|down_proj|blocks\.\d\.mlp\.linear_fc2|merger\.linear_fc1)"
BY_RECIPE = {
    "lora": ALL,
    "rslora": ALL | {"use_rslora": True, "lora_bias": "lora_only"},
    "dora beside full mergers": ALL | {"use_dora": True, "modules_to_save": MERGERS},
    "full mergers alone": ALL | {"target_regex": "^$", "modules_to_save": MERGERS},
    "longlora with embeddings": {"train_type": "longlora", "longlora_group_size": 16},
    "the language head": ALL | {"target_modules": ["lm_head", "q_proj"]},
}
"""Name -> tuner section."""
BY_PEFT = {
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "vera": ("VeraConfig", {"r": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "miss": ("MissConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "hira": ("HiraConfig", {"r": 4}),
}
"""Name -> (class of peft's config, its fields)."""
CASES = [(name, "dense") for name in (*BY_RECIPE, *BY_PEFT)]
CASES += [(name, "moe") for name in ("lora", "dora beside full mergers", "longlora with embeddings", "experts")]
CASES += [(name, kind) for name in ("lora", "the language head") for kind in ("qwen3_5", "qwen3_5_moe")]
READER = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
assert "qwenvl_ft" not in sys.modules and "peft" not in sys.modules
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert model.config.text_config.use_cache
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    torch.save({"logits": logits, "tokens": tokens, "tied": model.lm_head.weight is
        model.get_input_embeddings().weight}, folder + "/found.pt")
    json.dump(text, open(folder + "/text.json", "w"))
"""


@pytest.fixture(scope="module")
def inputs(processor):
    content = [
        {"type": "image", "image": Image.linear_gradient("L").convert("RGB").resize((96, 64))},
        {"type": "text", "text": "What is it?"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **options))


def adapted(name, kind, checkpoints):
    """Return an adapter whose weights differ from their initial values, on its base model."""
    import peft

    torch.manual_seed(0)
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa")
    if name in BY_RECIPE:
        model = prepare_model(model, TunerConfig(**BY_RECIPE[name]))
    elif name == "experts":
        names = [f"layers.1.mlp.experts.{weight}" for weight in ("gate_up_proj", "down_proj")]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    else:
        config, fields = BY_PEFT[name]
        model = peft.get_peft_model(model, getattr(peft, config)(target_modules=LINEARS, **fields))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape) * 0.05
    return model.eval()


def said(model, inputs):
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return logits, model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def merged(checkpoints, inputs, tmp_path_factory):
    """Return case -> (logits and tokens of the adapter model, those of another process, the folder), for all cases."""
    root, expected = tmp_path_factory.mktemp("merged"), {}
    for number, (name, kind) in enumerate(CASES):
        model = adapted(name, kind, checkpoints)
        expected[name, kind] = said(model, inputs)
        model.save_pretrained(root / f"adapter-{number}")
        merge(root / f"adapter-{number}", root / f"{number}")
        torch.save(inputs, root / f"{number}" / "inputs.pt")
    folders = [str(root / f"{number}") for number in range(len(CASES))]
    subprocess.run(
        [sys.executable, "-c", READER, *folders],
        check=True,
        cwd=root,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return {
        case: (expected[case], torch.load(root / f"{number}" / "found.pt"), root / f"{number}")
        for number, case in enumerate(CASES)
    }


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_plain_transformers_says_the_same(merged, checkpoints, inputs, name, kind):
    (logits, tokens), found, _ = merged[name, kind]
    rounding = 1e-4 if kind.startswith("qwen3_5") else 1e-5  # delta nets amplify it: in float64 both are equal
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=rounding)
    assert torch.equal(found["tokens"], tokens)
    base, _ = said(load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa").eval(), inputs)
    assert not torch.allclose(base, logits, atol=1e-3), "vacuous: the adapter changes nothing"


def test_what_was_tied_stays_tied_unless_the_head_was_adapted(merged):
    assert merged["lora", "dense"][1]["tied"]
    assert merged["longlora with embeddings", "dense"][1]["tied"]
    assert not merged["the language head", "dense"][1]["tied"]
    written = json.loads((merged["the language head", "dense"][2] / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_the_folder_is_that_of_a_released_model(merged, tiny_dir, processor):
    folder = merged["lora", "dense"][2]
    ours = {"inputs.pt", "found.pt", "text.json"}
    assert {path.name for path in folder.iterdir()} - ours == {path.name for path in tiny_dir.iterdir()} - {"done"}
    for name in ("generation_config.json", "tokenizer.json"):
        assert (folder / name).read_text() == (tiny_dir / name).read_text()
    template = (tiny_dir / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == template.replace(ENCLOSED_VIDEO, VIDEO_PAD) != template
    expected = processor.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert json.loads((folder / "text.json").read_text()) == expected
    written, base = (json.loads((path / "config.json").read_text()) for path in (folder, tiny_dir))
    assert written["text_config"] == base["text_config"]
    assert written["dtype"] == "float32"


@pytest.fixture
def saved(checkpoints, tmp_path):
    """A saved LoRA adapter of the dense model."""
    adapted("lora", "dense", checkpoints).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_weights_are_summed_in_float32_and_rounded_once(saved, tmp_path, checkpoints):
    from peft import PeftModel
    from safetensors.torch import load_file

    merge(saved, tmp_path / "half", torch_dtype="bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    base = load_model(checkpoints["dense"], torch_dtype="bfloat16", attn_impl="sdpa").float()
    whole = PeftModel.from_pretrained(base, saved).merge_and_unload().state_dict()
    assert all(torch.equal(half[key], whole[key].bfloat16()) for key in half)
    rough = load_model(checkpoints["dense"], torch_dtype="bfloat16", attn_impl="sdpa")
    rough = PeftModel.from_pretrained(rough, saved).merge_and_unload(safe_merge=True).state_dict()
    assert any(not torch.equal(half[key], rough[key]) for key in half), "vacuous: bfloat16 sums are the same"


def test_shards_are_no_larger_than_requested(saved, tmp_path):
    merge(saved, tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    load_model(tmp_path / "sharded", torch_dtype="float32")


def test_the_command_says_what_it_did_and_writes_into_no_other_folder(saved, tmp_path, capsys):
    assert main(["merge", str(saved), str(tmp_path / "new")]) == 0
    assert "LORA merged into 52 layers, modules trained in full: 0; float32, 3." in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert main(["merge", str(saved), str(tmp_path / "new")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_a_base_that_moved_is_named_in_the_error(saved, tmp_path, tiny_dir):
    config = saved / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_dir), "/nowhere/model"))
    with pytest.raises(CheckpointError, match="/nowhere/model, which does not exist"):
        merge(saved, tmp_path / "new")
    merge(saved, tmp_path / "new", base=str(tiny_dir))
    assert not list(tmp_path.glob(".*partial"))


def test_what_cannot_be_merged_is_refused_before_anything_is_written(checkpoints, tiny_dir, saved, tmp_path):
    from qwenvl_ft.recipe.schema import QuantizationConfig

    for train_type, kind in (("adapter", "BOTTLENECK"), ("reft", "REFT")):
        model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="sdpa")
        prepare_model(model, TunerConfig(train_type=train_type)).save_pretrained(tmp_path / kind)
        with pytest.raises(CheckpointError, match=f"type {kind}, which changes activations"):
            merge(tmp_path / kind, tmp_path / "new")
    with pytest.raises(CheckpointError, match="is a whole model, so there is nothing to merge"):
        merge(tiny_dir, tmp_path / "new")
    pytest.importorskip("bitsandbytes")
    quantization = QuantizationConfig(quantization_bit=4)
    load_model(tiny_dir, torch_dtype="float32", quantization=quantization).save_pretrained(tmp_path / "few")
    with pytest.raises(CheckpointError, match=r"is quantised \(by bitsandbytes\).*--base"):
        merge(saved, tmp_path / "new", base=str(tmp_path / "few"))
    with pytest.raises(CheckpointError, match=r"adapter does not fit .*tiny-moe"):
        merge(saved, tmp_path / "new", base=str(checkpoints["moe"]))
    assert not (tmp_path / "new").exists()


def test_a_broken_adapter_is_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] * float("nan")}, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be merged at .*NaNs"):
        merge(saved, tmp_path / "new")
    save_file({key: value for key, value in weights.items() if key != first}, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit .*: it lacks 1 weights, .*lora_A"):
        merge(saved, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_over_few_bits_is_merged_into_what_they_stand_for(tiny_dir, inputs, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from qwenvl_ft.recipe.load import load_recipe
    from qwenvl_ft.recipe.schema import QuantizationConfig

    section = {"quantization_bit": bits} | ({"bnb_4bit_comp_dtype": "float32"} if bits == 4 else {})
    options = {"torch_dtype": "float32", "attn_impl": "sdpa"}
    torch.manual_seed(0)
    quantised = load_model(tiny_dir, **options, quantization=QuantizationConfig(**section))
    model = prepare_model(quantised, TunerConfig(lora_rank=4, lora_dropout=0.0))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape) * 0.1
        model.save_pretrained(tmp_path / "adapter")
        load_recipe(None, [f"quantization.{key}={value}" for key, value in section.items()]).save(
            tmp_path / "adapter" / "recipe.yaml"
        )
        merge(tmp_path / "adapter", tmp_path / "new")
        merged = load_model(tmp_path / "new", **options)
        assert not hasattr(merged.config, "quantization_config")
        trained = model.train()(**inputs).logits  # in evaluation bitsandbytes rounds to bfloat16 on some CPUs
        (tmp_path / "adapter" / "recipe.yaml").unlink()
        merge(tmp_path / "adapter", tmp_path / "other")
        away = (load_model(tmp_path / "other", **options)(**inputs).logits - trained).abs().mean()
        near = (merged(**inputs).logits - trained).abs().mean()
    assert near < (1e-4 if bits == 4 else 0.02)
    assert near < away / 3, "vacuous: the weights in full would do as well"
