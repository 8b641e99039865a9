"""Every parameter of every family belongs to the part that trains or freezes with it."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.anatomy import (
    FAMILIES,
    PARTS,
    canonical_model_type,
    canonical_name,
    current_name,
    family_of,
    part_modules,
    part_of,
)


def skeleton(model_type):
    """Build the real class with two layers per tower, without weights."""
    config = CONFIG_MAPPING[model_type]()
    config.text_config.num_hidden_layers = 2
    config.vision_config.depth = 2
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:2]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param, skeleton(request.param)


def test_parts_are_the_modules_upstream_calls_so(family):
    """The reference is the module tree, not names: a parameter belongs to the part from which it is reachable."""
    model_type, model = family
    visual = model.model.visual
    mergers = [visual.merger, *(visual.deepstack_merger_list if model_type.startswith("qwen3_vl") else [])]
    assert len(mergers) == (4 if model_type.startswith("qwen3_vl") else 1)
    expected = {}
    for part, modules in (
        ("vision", [visual]),
        ("merger", mergers),
        ("llm", [model.model.language_model, model.lm_head]),
    ):
        for module in modules:
            expected.update({id(parameter): part for parameter in module.parameters()})
    named = dict(model.named_parameters(remove_duplicate=False))
    assert {name: part_of(name) for name in named} == {name: expected[id(p)] for name, p in named.items()}
    assert set(expected.values()) == set(PARTS), "vacuous: a part is empty"


def test_family_table_names_modules_that_exist(family):
    model_type, model = family
    table = family_of(model_type)
    for name in (
        *table.mergers,
        table.patch_embed,
        table.vision_blocks,
        table.text_layers,
        table.embeddings,
        table.head,
    ):
        assert model.get_submodule(name) is not None
    assert table.experts == hasattr(model.model.language_model.layers[1].mlp, "experts")
    assert set(part_modules(model)["merger"]) == set(table.mergers)


def test_largest_modules_cover_every_parameter_once(family):
    _, model = family
    seen = [
        f"{name}.{key}"
        for modules in part_modules(model).values()
        for name, module in modules.items()
        for key, _ in module.named_parameters(remove_duplicate=False)
    ]
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    "wrapped",
    [
        "{}",
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "base_model.model.{}",
        "module.base_model.model.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_wrappers_around_the_model_are_looked_through(wrapped):
    name = "model.visual.deepstack_merger_list.1.linear_fc1.weight"
    assert canonical_name(wrapped.format(name)) == name
    assert part_of(wrapped.format(name)) == "merger"
    assert part_of(wrapped.format("lm_head.weight")) == "llm"


@pytest.mark.parametrize(
    ("wrapped", "name", "part"),
    [
        ("base_model.model.model.visual.merger.modules_to_save.default.norm.bias", "visual.merger.norm.bias", "merger"),
        ("base_model.model.model.visual.merger.original_module.norm.bias", "visual.merger.norm.bias", "merger"),
        ("base_model.model.model.visual.modules_to_save.default.merger.norm.bias", "visual.merger.norm.bias", "merger"),
        ("base_model.model.model.visual.modules_to_save.a.pos_embed.weight", "visual.pos_embed.weight", "vision"),
        ("base_model.model.lm_head.modules_to_save.default.weight", None, "llm"),
        (
            "model.visual._fsdp_wrapped_module.merger._checkpoint_wrapped_module.norm.bias",
            "visual.merger.norm.bias",
            "merger",
        ),
        ("model.visual.blocks.0._orig_mod.attn.qkv.base_layer.weight", "visual.blocks.0.attn.qkv.weight", "vision"),
    ],
)
def test_wrappers_inside_the_model_are_looked_through(wrapped, name, part):
    if name is not None:
        assert canonical_name(wrapped).removeprefix("model.") == name
    assert part_of(wrapped) == part


def test_lora_weights_belong_to_the_part_they_adapt():
    name = "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight"
    assert canonical_name(name) == "model.visual.blocks.0.attn.qkv.lora_A.default.weight"
    assert part_of(name) == "vision"


def test_modules_have_parts_too():
    assert [part_of(name) for name in ("model.visual", "model.visual.merger", "model.language_model")] == list(PARTS)


def test_foreign_models_are_refused():
    with pytest.raises(CheckpointError, match=r"'encoder\.weight' belongs to none of the parts"):
        part_of("encoder.weight")
    with pytest.raises(CheckpointError, match="belongs to none"):
        part_modules(nn.Sequential(nn.Linear(2, 2)))
    for name in ("model.visualizer.weight", "model.old_lm_head.weight"):
        with pytest.raises(CheckpointError, match="belongs to none"):
            part_of(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.0", "model.language_model.layers.0"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("model.norm", "model.language_model.norm"),
        ("language_model.model.layers.3.mlp", "model.language_model.layers.3.mlp"),
        ("language_model.layers.3.mlp", "model.language_model.layers.3.mlp"),
        ("model.language_model.layers.3", "model.language_model.layers.3"),
        ("visual.merger", "model.visual.merger"),
        ("visual", "model.visual"),
        ("model.visual.merger", "model.visual.merger"),
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "lm_head"),
        ("q_proj", "q_proj"),
    ],
)
def test_names_of_older_releases_are_understood(old, new):
    assert current_name(old) == new


@pytest.mark.parametrize(
    ("spelling", "model_type"),
    [
        ("qwen_3-vl", "qwen3_vl"),
        ("qwen3_vl", "qwen3_vl"),
        ("Qwen3-VL-MoE", "qwen3_vl_moe"),
        ("qwen3_moe_vl", "qwen3_vl_moe"),
        ("Qwen2.5-VL", "qwen2_5_vl"),
        ("qwen2-vl", "qwen2_vl"),
    ],
)
def test_model_types_may_be_spelt_as_other_tools_do(spelling, model_type):
    assert canonical_model_type(spelling) == model_type


def test_unknown_model_types_name_the_supported_ones():
    with pytest.raises(RecipeError, match=r"'qwen3_v'.*Did you mean 'qwen3_vl'.*qwen2_5_vl"):
        canonical_model_type("qwen3_v")
    with pytest.raises(CheckpointError, match=r"'llama' is not supported.*qwen3_vl_moe"):
        family_of("llama")
