"""Names, patterns, shares and counts select exact sets of trainable weights in full training, listed by hand."""

import logging
import re

import pytest
import torch
from cases import MOST_KINDS
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.methods.full import free_weights
from qwenvl_ft.tuning.prepare import check_prepared, prepare_model


@pytest.fixture(scope="session")
def deep(tiny_dir):
    """Build a language model of 60 layers and a vision tower of 12, without weights."""
    config = AutoConfig.from_pretrained(tiny_dir)
    config.text_config.num_hidden_layers, config.vision_config.depth = 60, 12
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


def full(**settings):
    return TunerConfig(**({"train_type": "full", "freeze_vit": False, "freeze_aligner": False} | settings))


def names(model):
    return [name for name, _ in model.named_parameters()]


def layer(name):
    found = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


FROZEN = {
    "a layer, not those that begin with its number": (
        {"freeze_parameters": ["model.layers.1"]},
        lambda name: layer(name) == 1,
    ),
    "the name of today and an end dot": (
        {"freeze_parameters": ["model.language_model.layers.5."]},
        lambda name: layer(name) == 5,
    ),
    "several": (
        {"freeze_parameters": ["model.layers.0", "model.embed_tokens", "visual.patch_embed"]},
        lambda name: layer(name) == 0 or "embed_tokens" in name or "patch_embed" in name,
    ),
    "the guides' pattern is six layers": (
        {"freeze_parameters_regex": "model.layers.[0-5].*"},
        lambda name: layer(name) is not None and layer(name) <= 5,
    ),
    "a pattern without an end": (
        {"freeze_parameters_regex": r"layers\.[0-5]"},
        lambda name: layer(name) is not None and layer(name) <= 5,
    ),
    "numbers of two digits": (
        {"freeze_parameters_regex": r"language_model\.layers\.(1[0-9]|5\d).*"},
        lambda name: layer(name) in (*range(10, 20), *range(50, 60)),
    ),
    "any number": (
        {"freeze_parameters_regex": r"layers.\d+.mlp"},
        lambda name: layer(name) is not None and ".mlp." in name,
    ),
    "a word": (
        {"freeze_parameters_regex": "norm"},
        lambda name: "norm" in name,
    ),
    "a word before a number": ({"freeze_parameters_regex": "linear_fc"}, lambda name: "linear_fc" in name),
    "name and pattern": (
        {"freeze_parameters": ["model.layers.7"], "freeze_parameters_regex": "^model.visual.*"},
        lambda name: layer(name) == 7 or "visual" in name,
    ),
    "what trains anyway": (
        {"freeze_llm": True, "trainable_parameters": ["model.norm", "model.layers.3"]},
        lambda name: "language_model" in name and "language_model.norm" not in name and layer(name) != 3,
    ),
    "by pattern": (
        {"freeze_llm": True, "freeze_vit": True, "trainable_parameters_regex": r"layers\.5[89]\."},
        lambda name: "merger" not in name and layer(name) not in (58, 59),
    ),
    "over names": (
        {"freeze_parameters_regex": "layers", "trainable_parameters": ["model.layers.2"]},
        lambda name: layer(name) not in (None, 2),
    ),
    "the last layers": (
        {"freeze_llm": True, "unfreeze_topk_llm": 2},
        lambda name: "language_model" in name and layer(name) not in (58, 59),
    ),
    "the last blocks": (
        {"freeze_vit": True, "unfreeze_topk_vit": 3},
        lambda name: "visual" in name and "merger" not in name and not re.search(r"blocks\.(9|10|11)\.", name),
    ),
    "modules_to_save": (
        {"freeze_vit": True, "freeze_llm": True, "freeze_aligner": True, "modules_to_save": ["layers.59", "lm_head"]},
        lambda name: layer(name) != 59 and "embed_tokens" not in name,
    ),
}


@pytest.mark.parametrize("case", FROZEN)
def test_what_is_named_is_frozen_and_nothing_else(deep, case):
    settings, frozen = FROZEN[case]
    expected = {name for name in names(deep) if not frozen(name)}
    assert 0 < len(expected) < len(names(deep)), "vacuous"
    assert free_weights(deep, full(**settings)) == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_share_is_frozen_from_the_pixels_upwards(deep, share):
    sizes = [(name, value.numel()) for name, value in deep.named_parameters()]
    total, seen, expected = sum(size for _, size in sizes), 0, set()
    for name, size in sizes:
        seen += size
        if seen > share * total:
            expected.add(name)
    assert free_weights(deep, full(freeze_parameters_ratio=share)) == expected
    assert sizes[0][0].startswith("model.visual.")


def test_a_tied_head_is_the_embedding_and_that_is_said(fresh, caplog):
    model = fresh()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight, "vacuous: not tied"
    with caplog.at_level(logging.WARNING):
        found = free_weights(model, full(freeze_llm=True, freeze_vit=True, trainable_parameters=["lm_head"]))
    assert "model.language_model.embed_tokens.weight" in found
    assert not any("layers" in name for name in found)
    assert "lm_head.weight shares its weight with model.language_model.embed_tokens.weight" in caplog.text
    assert "lm_head.weight" in free_weights(fresh("moe"), full(freeze_llm=True, trainable_parameters=["lm_head"]))


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_training_moves_what_is_free_and_no_other_bit(fresh, train, kind):
    settings = full(
        freeze_parameters=["model.layers.1"],
        freeze_parameters_regex="visual.blocks.[01].*",
        trainable_parameters=["model.layers.1.input_layernorm"],
    )
    model = fresh(kind)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    free = free_weights(model, settings)
    train(prepare_model(model, settings))
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == free
    assert "model.language_model.layers.1.input_layernorm.weight" in moved
    assert "model.language_model.layers.1.mlp.gate.weight" not in moved
    model.get_parameter("model.language_model.layers.1.post_attention_layernorm.weight").requires_grad_(True)
    with pytest.raises(RecipeError, match=r"it is frozen by name, but model\.language_model\.layers\.1.*would train"):
        check_prepared(model, settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"freeze_parameters": ["model.layers.9"]},
            r"freeze_parameters names 'model.layers.9', but no .*Known: ",
        ),
        ({"freeze_parameters": ["embed_token"]}, r"names 'embed_token', but no weight's name begins"),
        ({"trainable_parameters": ["model.nrom"]}, r"trainable_parameters names .* Did you mean 'model.norm'"),
        (
            {"freeze_parameters_regex": "layers.[6-9]"},
            r"freeze_parameters_regex='layers.\[6-9\]' matches no weight",
        ),
        ({"trainable_parameters_regex": "("}, r"trainable_parameters_regex='\(' is not a regular expression"),
        ({"unfreeze_topk_llm": 1}, r"unfreeze_topk_llm=1 needs tuner.freeze_llm=true"),
        ({"freeze_vit": True, "unfreeze_topk_vit": 9}, r"unfreeze_topk_vit=9, but model.visual.blocks has 4 layers"),
        ({"freeze_parameters_ratio": 1.0}, r"nothing is left to train: .* all frozen. Freeze less in"),
    ],
)
def test_names_that_mean_nothing_are_one_line(fresh, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), full(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["freeze_parameters=[model.layers.0]", "unfreeze_topk_llm=2", "freeze_parameters_ratio=1"]
)
def test_an_adapter_does_not_read_them(key):
    with pytest.raises(RecipeError, match=r"is not read with tuner.train_type=lora.*train_type=full"):
        load_recipe(None, ["tuner.train_type=lora", f"tuner.{key}"])
    assert load_recipe(None, ["tuner.train_type=full", "tuner.freeze_llm=true", f"tuner.{key}"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"freeze_parameters_ratio": 1e-9}, True),
        ({"freeze_parameters_ratio": 0.3, "freeze_vit": True}, True),
        ({"freeze_parameters_ratio": 0.3}, False),
        ({"freeze_vit": True}, False),
    ],
)
def test_a_ratio_that_freezes_nothing_more_is_said(fresh, tuner, caplog, settings, says):
    prepare_model(fresh(), tuner(train_type="full", **settings))
    assert ("freezes nothing" in caplog.text) is says
