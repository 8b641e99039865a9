"""Rope scaling, lengths and device maps: what a recipe changes in a model's config, and the errors in one line."""

import json

import pytest
import torch
from loading_cases import edited, last_error
from transformers import AutoModelForImageTextToText

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.config import expand_device_map, parse_max_memory
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.source import load_config


@pytest.mark.parametrize(
    ("rope_scaling", "factor", "positions"),
    [
        ("linear", 2.0, 65536),
        ({"type": "yarn", "factor": 2.0, "mrope_interleaved": True}, 2.0, 65536),
        ("dynamic", 2.0, 32768),
        ("yarn", 2.0, 65536),
        ({"type": "yarn", "factor": 4}, 4.0, 131072),
        ('{"type":"yarn","factor":2.0}', 2.0, 65536),
        ('{"rope_type": "linear", "factor": 1.5}', 1.5, 49152),
    ],
)
def test_rope_scaling_keeps_mrope(tiny_dir, rope_scaling, factor, positions):
    before = load_model(tiny_dir, torch_dtype="float32")
    after = load_model(tiny_dir, torch_dtype="float32", rope_scaling=rope_scaling)
    old, new = before.config.text_config.rope_parameters, after.config.text_config.rope_parameters
    for key in ("mrope_section", "mrope_interleaved", "rope_theta"):
        assert new[key] == old[key]
    assert new["factor"] == factor
    assert after.config.text_config.max_position_embeddings == positions
    rotary, unscaled = after.model.language_model.rotary_emb, before.model.language_model.rotary_emb
    assert rotary.mrope_section == unscaled.mrope_section
    if new["rope_type"] == "linear":
        torch.testing.assert_close(rotary.inv_freq * factor, unscaled.inv_freq)
    if new["rope_type"] == "yarn":
        assert new["original_max_position_embeddings"] == 32768
        assert not torch.equal(rotary.inv_freq, unscaled.inv_freq), "yarn without effect"


def test_dynamic_scaling_stretches_only_beyond_the_trained_length(tiny_dir, tmp_path):
    def shorten(config):
        config["text_config"]["max_position_embeddings"] = 16

    model = load_model(edited(tiny_dir, tmp_path / "short", shorten), torch_dtype="float32", rope_scaling="dynamic")
    plain = load_model(tiny_dir, torch_dtype="float32")
    short, long = torch.arange(3, 13)[None], torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=short).logits, plain(input_ids=short).logits)
        assert not torch.allclose(model(input_ids=long).logits, plain(input_ids=long).logits, atol=1e-4)


def test_dynamic_scaling_leaves_packed_samples_alone_up_to_the_trained_length_only(tiny_dir, tmp_path):
    """A recipe with dynamic scaling must not have longer rows: one long sample would change all others."""

    def shorten(config):
        config["text_config"]["max_position_embeddings"] = 16

    short = edited(tiny_dir, tmp_path / "short", shorten)
    model = load_model(short, torch_dtype="float32", attn_impl="sdpa", rope_scaling="dynamic").eval()

    def logits(*lengths):
        positions = torch.cat([torch.arange(length) for length in lengths])
        ids = torch.cat([torch.arange(3, 3 + length) for length in lengths])[None]
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions.expand(4, 1, -1)).logits[0, -lengths[-1] :]

    torch.testing.assert_close(logits(16, 10), logits(10))
    assert not torch.allclose(logits(24, 10), logits(10), atol=1e-4), "the refusal has no reason"


def test_scaled_model_saves_and_loads_with_plain_transformers(tiny_dir, tmp_path):
    model = load_model(tiny_dir, torch_dtype="float32", rope_scaling="yarn").eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_max_model_len_sets_the_factor_it_needs(tiny_dir):
    model = load_model(tiny_dir, rope_scaling="yarn", max_model_len=4 * 32768)
    assert model.config.text_config.rope_parameters["factor"] == 4.0
    assert load_model(tiny_dir, max_model_len=4096).config.text_config.max_position_embeddings == 32768
    message = last_error(RecipeError, lambda: load_model(tiny_dir, max_model_len=40000))
    assert "32768 positions" in message
    assert "model.rope_scaling=yarn" in message
    message = last_error(
        RecipeError, lambda: load_model(tiny_dir, rope_scaling={"type": "yarn", "factor": 2.0}, max_model_len=131072)
    )
    assert "Use factor 4" in message


@pytest.mark.parametrize(
    ("rope_scaling", "words"),
    [
        ("yarm", "unknown type of model.rope_scaling 'yarm'. Did you mean 'yarn'"),
        ('{"type": "yarn",', "not valid JSON"),
        ({"type": "yarn", "factor": "two"}, "'two' is not a number"),
        ({"type": "yarn", "factr": 2.0}, "unknown key 'factr'. Did you mean 'factor'?"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 8}, "of type linear: unknown key 'beta_fast'"),
        ({"type": "yarn", "factor": 2.0, "mrope_section": [1, 1, 1]}, "mrope_section=[1, 1, 1] cannot be changed"),
        ({"type": "yarn", "factor": 0.5}, "0.5 is not a number of at least 1"),
    ],
)
def test_wrong_rope_scaling_is_one_line(tiny_dir, rope_scaling, words):
    assert words in last_error(RecipeError, lambda: load_model(tiny_dir, rope_scaling=rope_scaling))


def test_device_maps_place_modules(tiny_dir):
    for device_map in ("auto", "cpu", '{"": "cpu"}', {"": "cpu"}):
        model = load_model(tiny_dir, device_map=device_map, max_memory='{"cpu": "1GB"}')
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_device_map_ranges_become_one_entry_a_layer(tiny_dir):
    given = {"model.layers.0-1": 0, "model.layers.2-3": "1", "model.norm": "cpu", "visual": 0, "lm_head": "disk"}
    given |= {"model.embed_tokens": 0}
    assert expand_device_map(json.dumps(given), load_config(str(tiny_dir))) == {
        "model.language_model.layers.0": 0,
        "model.language_model.layers.1": 0,
        "model.language_model.layers.2": 1,
        "model.language_model.layers.3": 1,
        "model.language_model.embed_tokens": 0,
        "model.language_model.norm": "cpu",
        "model.visual": 0,
        "lm_head": "disk",
    }
    assert parse_max_memory('{"0": "40GB", "1": "40GiB", "cpu": "100GB"}') == {0: "40GB", 1: "40GiB", "cpu": "100GB"}


def test_a_model_placed_by_ranges_computes_the_same(tiny_dir):
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "visual", "lm_head"), "cpu")
    model = load_model(tiny_dir, torch_dtype="float32", device_map={"model.layers.0-3": "cpu"} | rest)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = load_model(tiny_dir, torch_dtype="float32")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_a_device_map_with_gaps_is_one_line(tiny_dir):
    message = last_error(
        RecipeError, lambda: load_model(tiny_dir, device_map={"model.layers.0-3": "cpu", "visual": "cpu"})
    )
    assert "leaves 2 weights without a device, the first is model.language_model.embed_tokens.weight." in message
    assert load_model(tiny_dir, device_map={"model.layers.0-3": "cpu", "": "cpu"}) is not None
