"""Activation checkpointing, of one part or both, and offloading change no loss and no gradient."""

from collections import Counter

import pytest
import torch
from cases import make_trainer, one_step
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.models.qwen3_vl import modeling_qwen3_vl as upstream

from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.activation_checkpointing import chosen_parts
from qwenvl_ft.training.arguments import build_arguments
from qwenvl_ft.upstream.arguments import is_reentrant

ALL = {"per_device_train_batch_size": 8}
LAYERS = {"vision": upstream.Qwen3VLVisionBlock, "llm": upstream.Qwen3VLTextDecoderLayer}


def run(folder, checkpoint, encoder, *, parts=None, frozen=None, **arguments):
    """Return loss, gradients, forward passes of a layer of each part, and bytes held by the graph."""
    trainer = make_trainer(folder, checkpoint, encoder, trainer_options={"checkpointed": parts}, **(ALL | arguments))
    for name, parameter in trainer.model.named_parameters():
        if frozen is not None and frozen(name):
            parameter.requires_grad_(False)
    calls, held, layers = Counter(), [0], {}
    for module in trainer.model.modules():
        for part, kind in LAYERS.items():
            if isinstance(module, kind):
                layers.setdefault(part, []).append(module)
                inner = module.attn if part == "vision" else module.self_attn
                inner.register_forward_hook(lambda *_, part=part: calls.update([part]))
    seen = set()

    def keep(tensor):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            held[0] += tensor.nbytes
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, gradients = one_step(trainer)
    return loss, gradients, {part: calls[part] / len(layers[part]) for part in LAYERS}, held[0]


CHECKPOINTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_dir, encoder):
    return run(tmp_path_factory.mktemp("plain"), tiny_dir, encoder)


def assert_same(found, expected):
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize(("vision", "llm"), [(True, True), (True, False), (False, True)])
def test_each_part_alone_and_both_are_recomputed_exactly(tmp_path, tiny_dir, encoder, plain, vision, llm):
    found = run(tmp_path, tiny_dir, encoder, parts={"vision": vision, "llm": llm}, **CHECKPOINTED)
    assert_same(found, plain)
    assert plain[2] == {"vision": 1, "llm": 1}
    assert found[2] == {"vision": 1 + vision, "llm": 1 + llm}


def test_offloaded_activations_are_the_same(tmp_path, tiny_dir, encoder, plain):
    kwargs = {"use_reentrant": False, "offload": True}
    found = run(tmp_path, tiny_dir, encoder, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    assert_same(found, plain)
    assert found[2] == {"vision": 2, "llm": 2}


@pytest.mark.parametrize("checkpointing", [{}, CHECKPOINTED], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("aligner", [False, True])
def test_a_frozen_vision_tower_has_no_graph(tmp_path, tiny_dir, encoder, plain, checkpointing, aligner):
    """With the aligner behind it trainable or frozen."""

    def frozen(name):
        return "visual" in name and (not aligner or "merger" not in name)

    found = run(tmp_path / "a", tiny_dir, encoder, frozen=frozen, **checkpointing)
    trained = {name: gradient for name, gradient in plain[1].items() if not frozen(name)}
    assert_same(found, (plain[0], trained))
    assert found[2]["vision"] == 1, "computed again for nothing"
    both = run(tmp_path / "b", tiny_dir, encoder, **checkpointing)
    assert found[3] < both[3], "vacuous: the trained tower holds no more"


def test_frozen_layers_at_the_bottom_are_computed_once(tmp_path, tiny_dir, encoder, plain):
    """transformers' hook on the embeddings would recompute them and propagate gradients down to the embeddings."""
    top = f"layers.{len([name for name in plain[1] if name.endswith('self_attn.q_proj.weight')]) - 1}."
    found = run(tmp_path, tiny_dir, encoder, frozen=lambda name: top not in name, **CHECKPOINTED)
    assert_same(found, (plain[0], {name: gradient for name, gradient in plain[1].items() if top in name}))
    assert found[2]["vision"] == 1
    assert 1 < found[2]["llm"] < 2, "only the top layer twice"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"llm": True, "vision": True}),
        (["training.gradient_checkpointing=false"], {"llm": False, "vision": False}),
        (["training.vit_gradient_checkpointing=false"], {"llm": True, "vision": False}),
        (
            ["training.gradient_checkpointing=false", "training.vit_gradient_checkpointing=true"],
            {"llm": False, "vision": True},
        ),
    ],
)
def test_the_recipe_says_which(tmp_path, tiny_dir, overrides, expected):
    settings = [f"model.model={tiny_dir}", "data.train=x.jsonl", f"training.output_dir={tmp_path}", *overrides]
    recipe = load_recipe("base", overrides=[*settings, "training.report_to=none", "model.torch_dtype=float32"])
    assert chosen_parts(recipe.training) == expected
    assert build_arguments(recipe).activation_checkpointing == any(expected.values())


@pytest.mark.parametrize("options", ["{early_stop: false}", "{determinism_check: none}", "{every_n_layers: 1}", "null"])
def test_options_of_checkpointing_do_not_make_it_reentrant(tmp_path, tiny_dir, options):
    """torch takes its reentrant form, which gives features of images no gradient, if options do not say it."""
    settings = [f"model.model={tiny_dir}", "data.train=x.jsonl", f"training.output_dir={tmp_path}"]
    given = f"training.activation_checkpointing_kwargs={options}"
    recipe = load_recipe("base", overrides=[*settings, "training.report_to=none", "model.torch_dtype=float32", given])
    args = build_arguments(recipe)
    assert args.activation_checkpointing_kwargs["use_reentrant"] is False
    assert not is_reentrant(args)


def test_options_that_leave_the_form_to_torch_are_reentrant(tmp_path):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "activation_checkpointing": True}
    forms = [
        is_reentrant(TrainingArguments(**plain, activation_checkpointing_kwargs=options))
        for options in ({"early_stop": False}, {"use_reentrant": False}, {"every_n_layers": 2}, None)
    ]
    assert forms == [True, False, False, False]
    tensor = torch.ones(1, requires_grad=True)
    with pytest.warns(UserWarning, match="use_reentrant parameter should be passed"):
        output = checkpoint(torch.exp, tensor, early_stop=False)
    assert type(output.grad_fn).__name__ == "CheckpointFunctionBackward", "torch's default is another form now"
