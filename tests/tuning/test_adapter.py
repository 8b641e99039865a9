"""A bottleneck adds ``up(act(down(h)))`` to an MLP's output, where the recipe says, and nowhere else."""

import pytest
import torch
from cases import MOST_KINDS, stirred
from transformers.activations import ACT2FN

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.adapters.bottleneck import BottleneckLayer
from qwenvl_ft.tuning.prepare import prepare_model

ALIGNER = r"^model\.visual\.(merger|deepstack_merger_list\.[0-2]).*"
MERGERS = ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{n}" for n in range(3))]
ONLY = {
    "llm": {"freeze_vit": True, "freeze_aligner": True},
    "vision": {"freeze_llm": True, "freeze_aligner": True},
    "merger": {"freeze_llm": True, "freeze_vit": True},
}


def wrapped(model):
    """Return the names of the modules that have a bottleneck."""
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, BottleneckLayer)]


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_the_output_is_the_papers_formula(fresh, tuner, batch, kind, act):
    """Hooks on a plain base model recompute the output of each adapted module with plain matrices."""
    settings = tuner(train_type="adapter", adapter_length=8, adapter_act=act)
    model = stirred(prepare_model(fresh(kind), settings), 0.1).eval()
    plain = fresh(kind).eval()

    def by_hand(layer):
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]

        def hook(module, inputs, output):
            inner = ACT2FN[act](output @ down.weight.T + down.bias)
            return output + inner @ up.weight.T + up.bias

        return hook

    for name in wrapped(model):
        plain.get_submodule(name).register_forward_hook(by_hand(model.get_base_model().get_submodule(name)))
    with torch.no_grad():
        found, expected = model(**batch).logits, plain(**batch).logits
        assert not torch.allclose(found, fresh(kind)(**batch).logits, atol=1e-2), "vacuous: nothing was added"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("part", ONLY)
def test_a_part_gets_a_bottleneck_behind_every_mlp(fresh, tuner, kind, part):
    expected = {
        "llm": [f"model.language_model.layers.{n}.mlp" for n in range(4)],
        "vision": [f"model.visual.blocks.{n}.mlp" for n in range(4)],
        "merger": MERGERS[:1] if kind.startswith("qwen3_5") else MERGERS,
    }
    model = prepare_model(fresh(kind), tuner(train_type="adapter", **ONLY[part]))
    assert sorted(wrapped(model)) == sorted(expected[part])


def test_sizes_are_the_papers(fresh, tuner):
    """Houlsby and others count 2 M D + D + M parameters for one adapter."""
    model = prepare_model(fresh(), tuner(train_type="adapter", adapter_length=24, **ONLY["merger"]))
    for name in wrapped(model):
        layer = model.get_base_model().get_submodule(name)
        own = [value for key, value in layer.named_parameters() if "bottleneck_" in key]
        assert sum(value.numel() for value in own) == 2 * 24 * 64 + 64 + 24
        assert all(value.dtype == torch.float32 for value in own)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"target_regex": ALIGNER}, MERGERS),
        ({"target_modules": ["deepstack_merger_list.1"]}, MERGERS[2:3]),
        ({"target_modules": ["visual.merger", "layers.2.mlp"]}, [MERGERS[0], "model.language_model.layers.2.mlp"]),
        (
            {"target_regex": r".*language_model\.layers\.[23]\..*"},
            [f"model.language_model.layers.{n}.mlp" for n in (2, 3)],
        ),
        ({"modules_to_save": ["model.visual.merger"], **ONLY["merger"]}, MERGERS[1:]),
    ],
)
def test_targets_are_honoured(fresh, tuner, targets, expected):
    model = prepare_model(fresh(), tuner(train_type="adapter", **targets))
    assert sorted(wrapped(model)) == sorted(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter_act": "gelo"}, r"unknown tuner\.adapter_act 'gelo'\. Did you mean 'gelu'"),
        ({"target_modules": ["q_proj"]}, r"'q_proj' matches no MLP that a bottleneck could follow.*Known: mlp, model"),
        ({"target_regex": "^$"}, r"'\^\$' matches no MLP"),
        ({"target_regex": "("}, r"not a regular expression"),
        (
            {"target_regex": ALIGNER, **ONLY["llm"]},
            r"MLPs of merger, which the recipe freezes.*tuner\.freeze_aligner=false",
        ),
        (
            {"freeze_llm": True, "freeze_vit": True, "freeze_aligner": True},
            r"no MLP in an unfrozen part.*freeze_llm=false",
        ),
    ],
)
def test_what_cannot_be_adapted_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), tuner(train_type="adapter", **settings))
    assert "\n" not in str(caught.value)


def test_it_does_not_merge_and_says_why(fresh, tuner, logits):
    model = stirred(prepare_model(fresh(), tuner(train_type="adapter")), 0.1)
    with pytest.raises(CheckpointError, match="cannot be merged"):
        model.merge_and_unload()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(fresh()))
    assert torch.equal(logits(model.unload()), logits(fresh()))


def test_half_precision_computes_in_the_models_precision(fresh, tuner, batch):
    model = stirred(prepare_model(fresh(torch_dtype="bfloat16"), tuner(train_type="adapter")), 0.1)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).logits.dtype == torch.bfloat16
