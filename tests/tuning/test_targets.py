"""A name in a recipe matches the modules that a reader expects, and a name that matches nothing is an error."""

import re

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.tuning.targets import adapter_targets, saved_modules

LAYERS = 36
LAST_TWO = r"^(model\.)?language_model\.layers\.(34|35)\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$"
ALIGNER = r"^model\.visual\.(merger|deepstack_merger_list\.[0-2]).*"


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.fixture(scope="module")
def deep():
    """Build Qwen3-VL with the released 4B model's 36 layers, narrow and without weights."""
    config = CONFIG_MAPPING["qwen3_vl"]()
    text = config.text_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size = LAYERS, 64, 64, 64
    config.vision_config.depth = 26
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_all_linear_is_every_linear_layer_but_the_head(deep, tuner):
    targets = adapter_targets(deep, tuner())
    assert targets == [name for name in linears(deep) if name != "lm_head"]
    assert not [name for name in targets if "patch_embed" in name or "embed_tokens" in name]
    assert len(targets) == LAYERS * 7 + 26 * 4 + 4 * 2


def test_plain_names_hit_every_layer_that_ends_so(deep, tuner):
    assert len(adapter_targets(deep, tuner(target_modules=["q_proj", "v_proj"]))) == 2 * LAYERS
    assert len(adapter_targets(deep, tuner(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))) == 4 * LAYERS
    dotted = adapter_targets(deep, tuner(target_modules=["mlp.up_proj", "mlp.down_proj"]))
    assert len(dotted) == 2 * LAYERS
    assert all(re.search(r"\.mlp\.(up|down)_proj$", name) for name in dotted)


def test_a_suffix_begins_at_a_dot(deep, tuner):
    """``proj`` is the attention output of the vision blocks, not every name that ends in these letters."""
    targets = adapter_targets(deep, tuner(target_modules=["proj"]))
    assert targets == [f"model.visual.blocks.{n}.attn.proj" for n in range(26)]
    full = adapter_targets(deep, tuner(target_modules=["layers.1.self_attn.q_proj"]))
    assert full == ["model.language_model.layers.1.self_attn.q_proj"], "layers.1 must not hit layers.11"


def test_names_of_older_releases_work(deep, tuner):
    targets = adapter_targets(deep, tuner(target_modules=["model.layers.3.mlp.up_proj", "visual.merger.linear_fc1"]))
    assert targets == ["model.visual.merger.linear_fc1", "model.language_model.layers.3.mlp.up_proj"]


def test_lists_and_all_linear_stay_out_of_frozen_parts(deep, tuner):
    targets = adapter_targets(deep, tuner(target_modules=["linear_fc1"], freeze_vit=True))
    assert targets == [
        "model.visual.merger.linear_fc1",
        *(f"model.visual.deepstack_merger_list.{n}.linear_fc1" for n in range(3)),
    ]
    assert len(adapter_targets(deep, tuner(freeze_vit=True, freeze_aligner=True))) == LAYERS * 7


def test_the_head_is_adapted_only_when_named(deep, tuner):
    assert adapter_targets(deep, tuner(target_modules=["lm_head"])) == ["lm_head"]
    with pytest.raises(RecipeError, match=r"'lm_head' matches only modules of llm.*Set tuner\.freeze_llm=false"):
        adapter_targets(deep, tuner(target_modules=["lm_head"], freeze_llm=True))


def test_regex_hits_the_last_two_layers_and_nothing_else(deep, tuner):
    targets = adapter_targets(deep, tuner(target_regex=LAST_TWO, target_modules=["q_proj"]))
    assert len(targets) == 2 * 7
    assert all(
        name.startswith(("model.language_model.layers.34.", "model.language_model.layers.35.")) for name in targets
    )


def test_regex_over_the_aligner_takes_its_linear_layers_only(deep, tuner):
    targets = adapter_targets(deep, tuner(target_regex=ALIGNER, freeze_llm=True, freeze_vit=True))
    matched = [name for name, _ in deep.named_modules() if re.fullmatch(ALIGNER, name)]
    assert len(matched) > len(targets) == 8, "vacuous: the regex hits Linear layers alone"
    assert {type(deep.get_submodule(name)) for name in targets} == {nn.Linear}


def test_the_empty_regex_asks_for_no_adapter(deep, tuner):
    assert adapter_targets(deep, tuner(target_regex="^$")) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj', which is not a module.*Did you mean 'q_proj'"),
        ({"target_modules": ["mlp.up_prj"]}, r"Did you mean 'mlp\.up_proj'"),
        ({"target_modules": ["q_proj", "k"]}, r"names 'k', which is not a module"),
        ({"target_modules": ["self_attn"]}, r"is a Qwen3VLTextAttention, not a Linear layer.*q_proj, k_proj"),
        ({"target_modules": ["embed_tokens"]}, r"Embedding, not a Linear layer.*modules_to_save"),
        ({"target_modules": ["patch_embed.proj"]}, r"Conv3d, not a Linear layer"),
        ({"target_modules": ["q_proj.weight"]}, r"is a parameter. Name its module: model\.language_model"),
        ({"target_modules": ["qkv"], "freeze_vit": True}, r"only modules of vision.*Set tuner\.freeze_vit=false"),
        (
            {"target_modules": ["merger.linear_fc1"], "modules_to_save": ["model.visual.merger"]},
            r"modules_to_save trains in full",
        ),
        ({"target_regex": "q_proj"}, r"matches no Linear module. It must match a whole name, such as model\."),
        ({"target_regex": "(", "freeze_vit": True}, r"is not a regular expression"),
        ({"target_regex": ALIGNER, "freeze_aligner": True}, r"only modules of merger.*tuner\.freeze_aligner=false"),
    ],
)
def test_names_that_match_nothing_say_what_would(deep, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        adapter_targets(deep, tuner(**settings))
    assert "\n" not in str(caught.value)


def test_saved_modules_are_full_names(deep, tuner):
    wanted = ["model.visual.merger", "visual.deepstack_merger_list.0", "deepstack_merger_list.1", "lm_head"]
    assert saved_modules(deep, tuner(modules_to_save=wanted)) == [
        "model.visual.merger",
        "model.visual.deepstack_merger_list.0",
        "model.visual.deepstack_merger_list.1",
        "lm_head",
    ]


def test_a_module_list_stands_for_its_elements(deep, tuner):
    assert saved_modules(deep, tuner(modules_to_save=["visual.deepstack_merger_list"])) == [
        f"model.visual.deepstack_merger_list.{n}" for n in range(3)
    ]
    assert len(saved_modules(deep, tuner(modules_to_save=["model.layers"]))) == LAYERS


def test_a_module_within_a_saved_one_is_not_saved_twice(deep, tuner):
    names = ["model.visual.merger.linear_fc1", "model.visual.merger", "model.visual.merger"]
    assert saved_modules(deep, tuner(modules_to_save=names)) == ["model.visual.merger"]


def test_saved_modules_get_no_adapter(deep, tuner):
    targets = adapter_targets(deep, tuner(modules_to_save=["model.visual.merger"], freeze_vit=True, freeze_llm=True))
    assert targets == [f"model.visual.deepstack_merger_list.{n}.linear_fc{layer}" for n in range(3) for layer in (1, 2)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.visual.mergr", r"'model\.visual\.mergr', which is not a module.*Did you mean 'model\.visual\.merger'"),
        ("model.visual.merger.norm.weight", r"is a parameter. Name its module: model\.visual\.merger\.norm\."),
        ("rotary_emb", r"has no parameters"),
        ("", r"which is not a module"),
    ],
)
def test_saved_names_that_match_nothing_are_errors(deep, tuner, name, words):
    with pytest.raises(RecipeError, match=words):
        saved_modules(deep, tuner(modules_to_save=[name]))
