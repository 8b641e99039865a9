"""Loading follows config.json, turns the cache off, and reports a bad checkpoint in one line."""

import json
import shutil

import pytest
import torch
from cases import KINDS
from loading_cases import edited, last_error
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.load import LoadOptions, load_model, load_processor, plan_loading


def test_class_follows_config_not_the_name_of_the_directory(checkpoints, tmp_path):
    for kind, name, expected in (
        ("dense", "Qwen3-VL-30B-A3B-Instruct", Qwen3VLForConditionalGeneration),
        ("dense", "qwen2.5-vl-moe-starter", Qwen3VLForConditionalGeneration),
        ("moe", "qwen2-vl", Qwen3VLMoeForConditionalGeneration),
    ):
        directory = shutil.copytree(checkpoints[kind], tmp_path / name)
        assert type(load_model(directory)) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_plain_transformers(checkpoints, kind):
    ours = load_model(checkpoints[kind], torch_dtype="float32").state_dict()
    plain = AutoModelForImageTextToText.from_pretrained(checkpoints[kind]).state_dict()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "text", ["", '{"weight_map": {"a', "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_one_line_also_with_a_device_map(tiny_dir, tmp_path, text):
    folder = tmp_path / "model"
    load_model(tiny_dir, torch_dtype="float32").save_pretrained(folder, max_shard_size="300KB")
    index = folder / "model.safetensors.index.json"
    assert plan_loading(folder, LoadOptions()).source == str(folder), "vacuous"
    index.write_text(text)
    for options in (LoadOptions(), LoadOptions(device_map="cpu")):
        with pytest.raises(CheckpointError, match=rf"^{index} is damaged: it does not say which file holds which"):
            plan_loading(folder, options)


def test_cache_is_off_at_every_level_and_generation_still_uses_one(tiny_dir):
    model = load_model(tiny_dir, torch_dtype="float32")
    assert model.config.use_cache is False
    assert model.config.text_config.use_cache is False
    assert AutoModelForImageTextToText.from_pretrained(tiny_dir).config.text_config.use_cache, "vacuous: off anyway"
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).past_key_values is None
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model.generate(input_ids=ids, max_new_tokens=3)
    assert seen == [3, 1, 1], "the prompt once, then one token at a time"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        ("auto", torch.float32),
    ],
)
def test_dtype_is_the_one_named(tiny_dir, name, dtype):
    assert {parameter.dtype for parameter in load_model(tiny_dir, torch_dtype=name).parameters()} == {dtype}


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_reaches_text_and_vision(tiny_dir, name):
    model = load_model(tiny_dir, attn_impl=name)
    configs = (model.config, model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in configs] == [name] * 3


def test_model_type_is_checked_and_may_be_an_alias(tiny_dir):
    assert load_model(tiny_dir, model_type="qwen_3-vl") is not None
    message = last_error(RecipeError, lambda: load_model(tiny_dir, model_type="qwen2_vl"))
    assert "model.model_type=qwen2_vl" in message
    assert "'qwen3_vl'" in message


def test_revision_reaches_the_hub(tiny_dir):
    """A local directory has no revisions; the error about a missing hub id names it and the cause."""
    assert load_model(tiny_dir, revision="main") is not None
    message = last_error(CheckpointError, lambda: load_model("nobody/no-such-model", revision="v2"))
    assert "'nobody/no-such-model'" in message
    assert "No such directory exists" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": '{"": 0'}, "not valid JSON"),
        ({"device_map": "[0]"}, "unknown model.device_map"),
        ({"device_map": "autos"}, "Did you mean 'auto'"),
        ({"device_map": {"model.layers.3-1": "cpu"}}, "range in 'model.layers.3-1' is empty"),
        ({"device_map": {"model.layers.0-9": "cpu"}}, "layers.0 to model.language_model.layers.3, 4 in all"),
        ({"device_map": {"model.visul": "cpu"}}, "Did you mean 'model.visual'"),
        (
            {"device_map": {"model.layers.0-2": "cpu", "model.language_model.layers.2-3": "cpu"}},
            "layers.2 twice, the second time",
        ),
        ({"device_map": {"visual": "cpu", "model.visual": "cpu", "": "cpu"}}, "model.visual twice"),
        ({"device_map": 64}, "places 'all' on 64, but this machine has only cpu"),
        ({"device_map": "cuda:64"}, "places 'all' on 'cuda:64', but this machine has only cpu"),
        ({"device_map": {"": "cpu", "visual": "cuda:64"}}, "places 'model.visual' on 'cuda:64', but this machine"),
        ({"device_map": {"": "gpu"}}, "on 'gpu', but this machine has only"),
        ({"device_map": {"": None}}, "on None, but this machine has only"),
        ({"max_memory": {"0": "40GB"}}, "Set model.device_map=auto"),
        ({"device_map": "auto", "max_memory": {"0": "lots"}}, "the size 'lots'"),
        ({"torch_dtype": "bf16"}, "unknown model.torch_dtype 'bf16'. Did you mean 'bfloat16'"),
        ({"max_model_len": 0}, "is not a length"),
    ],
)
def test_wrong_options_are_one_line(tiny_dir, options, words):
    assert words in last_error(RecipeError, lambda: load_model(tiny_dir, **options))


def test_device_map_and_several_processes_exclude_each_other(tiny_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in last_error(RecipeError, lambda: load_model(tiny_dir, device_map="auto"))
    assert load_model(tiny_dir) is not None


def test_options_of_a_recipe_and_keywords_load_the_same(tiny_dir):
    model = load_model(tiny_dir, LoadOptions(torch_dtype="float16", attn_impl="eager"), attn_impl="sdpa")
    assert (model.dtype, model.config._attn_implementation) == (torch.float16, "sdpa"), "keywords take precedence"
    with pytest.raises(TypeError, match="torch_dtyp"):
        load_model(tiny_dir, torch_dtyp="float16")


def test_a_directory_that_is_no_model_is_one_line(tiny_dir, tmp_path):
    assert "no such model directory" in last_error(CheckpointError, lambda: load_model(tmp_path / "nothing"))
    assert "no such model directory" in last_error(CheckpointError, lambda: load_model("./nothing"))
    assert "has no config.json" in last_error(CheckpointError, lambda: load_model(tmp_path))
    assert "is a file" in last_error(CheckpointError, lambda: load_model(tiny_dir / "config.json"))
    shutil.copytree(tiny_dir, tmp_path / "checkpoint-40")
    assert f"Did you mean {tmp_path / 'checkpoint-40'}?" in last_error(CheckpointError, lambda: load_model(tmp_path))


def test_unsupported_and_broken_configs_are_one_line(tiny_dir, tmp_path):
    llama = edited(tiny_dir, tmp_path / "llama", lambda config: config.update(model_type="llama"))
    message = last_error(CheckpointError, lambda: load_model(llama))
    assert "'llama' is not supported" in message
    assert "qwen3_vl_moe" in message
    bare = edited(tiny_dir, tmp_path / "bare", lambda config: config.pop("model_type"))
    assert "names no model_type" in last_error(CheckpointError, lambda: load_model(bare))
    (bare / "config.json").write_text("{")
    assert "cannot read the config" in last_error(CheckpointError, lambda: load_model(bare))
    typed = edited(tiny_dir, tmp_path / "typed", lambda config: config["text_config"].update(hidden_size="wide"))
    assert "config.json of" in last_error(CheckpointError, lambda: load_model(typed))


def test_damaged_weights_are_one_line(tiny_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot load the weights" in last_error(CheckpointError, lambda: load_model(broken))
    weights.unlink()
    assert "cannot load the weights" in last_error(CheckpointError, lambda: load_model(broken))
    tensors = load_file(tiny_dir / "model.safetensors")
    del tensors["model.visual.merger.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = last_error(CheckpointError, lambda: load_model(broken))
    assert "lacks 1 weights" in message
    assert "model.visual.merger.norm.weight" in message
    wide = edited(tiny_dir, tmp_path / "wide", lambda config: config["text_config"].update(intermediate_size=128))
    assert "shapes" in last_error(CheckpointError, lambda: load_model(wide))


def test_pickled_weights_are_refused(tiny_dir, tmp_path):
    directory = shutil.copytree(tiny_dir, tmp_path / "pickled")
    model = AutoModelForImageTextToText.from_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert "cannot load the weights" in last_error(CheckpointError, lambda: load_model(directory))


@pytest.fixture
def adapter(tiny_dir, tmp_path):
    """Return a LoRA of the tiny model whose B is not zero, saved by plain peft, with its inputs and logits."""
    model = load_model(tiny_dir, torch_dtype="float32").eval()
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        return tmp_path / "adapter", ids, peft_model.eval()(input_ids=ids).logits


def test_an_adapter_directory_loads_on_its_base(adapter, tiny_dir):
    directory, ids, logits = adapter
    model = load_model(directory, torch_dtype="float32").eval()
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
        base = load_model(tiny_dir, torch_dtype="float32").eval()(input_ids=ids).logits
    assert not torch.allclose(base, logits), "vacuous: the adapter changes nothing"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_processor(directory).tokenizer.eos_token == "<|im_end|>"


def test_an_adapter_without_its_base_is_one_line(adapter):
    directory, _, _ = adapter
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    message = last_error(CheckpointError, lambda: load_model(directory))
    assert "adapter of /gone/base" in message
    assert "base_model_name_or_path" in message
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "does not name its base" in last_error(CheckpointError, lambda: load_model(directory))


def test_processor_areas_bound_every_image(tiny_dir):
    from PIL import Image

    picture = Image.new("RGB", (400, 300))
    processor = load_processor(tiny_dir, min_pixels=4096, max_pixels=16384)
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (4096, 16384)
    video = load_processor(tiny_dir).video_processor.size
    assert processor.video_processor.size["longest_edge"] == video["longest_edge"], "a video's area is its own"
    for side, low, high in ((400, 0, 16384), (20, 4096, 1e9)):
        grid = processor.image_processor(images=[picture.resize((side, side))])["image_grid_thw"][0]
        assert low <= grid.prod() * 16 * 16 <= high
    untouched = load_processor(tiny_dir).image_processor(images=[picture])["image_grid_thw"][0]
    assert untouched.prod() * 16 * 16 > 16384, "vacuous: the checkpoint's own area is as small"


def test_one_area_moves_the_other_out_of_its_way(tiny_dir):
    size = load_processor(tiny_dir, max_pixels=512).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (512, 512)
    size = load_processor(tiny_dir, min_pixels=10**6).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (10**6, 10**6)
    size = load_processor(tiny_dir, video_max_pixels=10**5).video_processor.size
    assert size["longest_edge"] == 10**5


def test_areas_survive_saving(tiny_dir, tmp_path):
    load_processor(tiny_dir, min_pixels=4096, max_pixels=16384).save_pretrained(tmp_path)
    size = load_processor(tmp_path).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (4096, 16384)


def test_wrong_areas_and_missing_processors_are_one_line(tiny_dir, tmp_path):
    assert "is above" in last_error(RecipeError, lambda: load_processor(tiny_dir, min_pixels=2000, max_pixels=1000))
    assert "not an area" in last_error(RecipeError, lambda: load_processor(tiny_dir, max_pixels=0))
    shutil.copy(tiny_dir / "config.json", tmp_path)
    assert "has no processor" in last_error(CheckpointError, lambda: load_processor(tmp_path))
    assert "cannot load the processor" in last_error(CheckpointError, lambda: load_processor("nobody/no-such-model"))
