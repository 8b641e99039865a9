"""upstream/layers.py, arguments.py, experts.py, processes.py: replacements take effect, or are refused by name."""

import functools

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.compiled import compile_layers
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.upstream import arguments, experts, layers, processes
from qwenvl_ft.upstream.probe import Feature, fallbacks, takes


def test_what_stands_in_computes_and_steps_aside_again():
    module = nn.Linear(2, 2)
    layers.replace_forward(module, lambda x: x * 0)
    assert not module(torch.ones(1, 2)).any()
    layers.restore_forward(module)
    assert layers.replaced_forward(module) is None
    assert layers.is_plain_linear(module.forward)
    assert layers.owner_of(module.forward) is module


def test_attention_with_another_rotation_is_the_same_forward(tiny_dir):
    """Without rotation the output differs; with transformers' own rotation it does not."""
    layer = load_model(tiny_dir, torch_dtype="float32", attn_impl="eager").model.language_model.layers[0].self_attn
    size = layer.head_dim
    angles = torch.randn(1, 3, size), torch.randn(1, 3, size)
    hidden = torch.randn(1, 3, layer.q_proj.in_features)
    given = {"hidden_states": hidden, "position_embeddings": angles, "attention_mask": None}
    with torch.no_grad():
        expected = layer(**given)[0]
        same = layers.with_rotation(layer, modeling.apply_rotary_pos_emb)(**given)[0]
        other = layers.with_rotation(layer, lambda query, key, cos, sin: (query, key))(**given)[0]
    assert torch.equal(same, expected)
    assert not torch.allclose(other, expected)
    assert layers.with_rotation(nn.Linear(2, 2), lambda *_: None) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_computed_again_as_often_as_before(tiny_dir, checkpointing):
    """`call_layer` recomputes a layer, in whichever way the installed transformers does."""
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.model.language_model.layers:
        plain = layers.plain_forward(type(layer))

        def counted(own, hidden, *, plain=plain, **options):
            calls.append(1)
            return plain(own, hidden, **options)

        layers.replace_forward(
            layer, lambda hidden, own=layer, run=counted, **options: layers.call_layer(own, run, hidden, options)
        )
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids).logits.sum().backward()
    assert len(calls) == 4 * (1 + checkpointing)


def test_a_release_with_another_layer_refuses_to_compile(tiny_dir, monkeypatch):
    layer = modeling.Qwen3VLTextDecoderLayer

    def renamed(self, states, positions, mask=None):
        raise AssertionError

    monkeypatch.setattr(layer, "forward", functools.wraps(renamed)(lambda self, *args: None))
    layers.COMPILED.missing.cache_clear()
    try:
        model = load_model(tiny_dir, torch_dtype="float32")
        with pytest.raises(RecipeError, match=r"training.torch_compile=true: .* Remove the key, or install"):
            compile_layers(model)
    finally:
        layers.COMPILED.missing.cache_clear()


def test_arguments_are_known_by_their_newest_names(tmp_path):
    recipe = load_recipe(None, ["training.activation_checkpointing=false"])
    assert "activation_checkpointing" in recipe.training.arguments
    args = TrainingArguments(**arguments.as_installed({"output_dir": str(tmp_path), "activation_checkpointing": True}))
    assert arguments.recomputes(args)
    assert not arguments.recomputes(TrainingArguments(output_dir=str(tmp_path)))
    given = recipe_from_argv(["--gradient_checkpointing", "false"])
    assert given.training.arguments["activation_checkpointing"] is False


def test_an_option_of_checkpointing_that_a_release_lacks_is_refused(monkeypatch):
    name = arguments.installed_name("activation_checkpointing") + "_enable"
    monkeypatch.setattr(PreTrainedModel, name, lambda self, kwargs=None: None)
    with pytest.raises(RecipeError, match=r"activation_checkpointing_kwargs.offload: transformers .* does not have it"):
        arguments.require_checkpointing_options({"offload": True})
    arguments.require_checkpointing_options({"use_reentrant": False})


def test_experts_are_computed_one_by_one_where_torch_has_no_grouped_product(checkpoints, monkeypatch):
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        expected = load_model(checkpoints["moe"], torch_dtype="float32").eval()(**ids).logits
        monkeypatch.setattr(experts, "no_grouped_product", lambda dtype: "has none")
        model = load_model(checkpoints["moe"], torch_dtype="float32").eval()
        torch.testing.assert_close(model(**ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert experts.experts_implementation(model.config, "float32") == {"experts_implementation": "eager"}
    dense = load_model(checkpoints["dense"], torch_dtype="float32").config
    assert experts.experts_implementation(dense, "float32") == {}


def test_a_second_run_of_a_process_may_have_another_precision(monkeypatch):
    processes.forget_precision()
    monkeypatch.delattr(AcceleratorState, "_reset_state")
    with pytest.raises(RecipeError, match=r"phases: accelerate .* one process cannot train twice"):
        processes.forget_precision()


def test_what_is_missing_is_a_line_each():
    here = Feature(name="this", packages=("torch",), missing=lambda: "", instead="that")
    gone = Feature(name="this", packages=("torch", "no-such"), missing=lambda: "has no x", instead="that runs")
    assert here.line() == ""
    assert (
        gone.line() == f"this: torch {torch.__version__.split('+')[0]} and no-such (not installed) has no x; that runs"
    )
    assert all("\n" not in line for line in fallbacks())


def test_a_signature_is_read_as_python_calls_it():
    def known(self, a, b=1, *, c):
        """Three names."""

    assert takes(known, "a", "c") == ""
    assert "without 'd'" in takes(known, "a", "c", "d")
    assert "needs 'c'" in takes(known, "a")
    assert takes(lambda **anything: None, "a", "b") == ""
