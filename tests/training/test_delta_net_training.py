"""Delta nets restart at each sample under every way of training that runs or changes their layers otherwise.

Reference: transformers' own forward of each sample alone, without any hook of this package.
"""

import pytest
import torch
from cases import gradient_tolerance, stirred, without_hooks

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.compiled import compile_layers
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.preflight import try_model
from qwenvl_ft.tuning.methods.llamapro import new_blocks
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream import delta_net

TEXT_ONLY = {"freeze_vit": True, "freeze_aligner": True}


def checkpointed(model, *, reentrant):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def expanded(model):
    """Add a block above each layer, and give all of them an effect."""
    settings = TunerConfig(train_type="llamapro", llamapro_num_new_blocks=4, **TEXT_ONLY)
    return stirred(prepare_model(model, settings), 0.05)


CHANGES = {
    "as it is": lambda model: model,
    "new blocks": expanded,
    "adapted": lambda model: stirred(prepare_model(model, TunerConfig(train_type="lora", lora_dropout=0.0)), 0.05),
}
"""Changes of the weights, of the reference too."""
WAYS = {
    "plain": lambda model: model,
    "checkpointed": lambda model: checkpointed(model, reentrant=False),
    "reentrant": lambda model: checkpointed(model, reentrant=True),
}
CASES = [("as it is", way) for way in WAYS] + [("new blocks", "checkpointed"), ("adapted", "checkpointed")]


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


def gradients(model, batches):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, split_labels(batch))
        loss.backward()
        total += loss.item()
    return total, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def alone(sample):
    """Return the batch of a sample without borders, which transformers refuses without the kernels that use them."""
    batch = QwenVLCollator()([sample])
    return {name: value for name, value in batch.items() if not name.startswith(("cu_seq_lens", "max_length"))}


@pytest.mark.parametrize("kind", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("change", "way"), CASES)
def test_a_packed_row_gives_the_loss_and_gradients_of_its_samples(checkpoints, samples, kind, change, way):
    torch.manual_seed(0)
    model = CHANGES[change](load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa").train())
    loss, expected = gradients(without_hooks(model), [alone(sample) for sample in samples])
    model = WAYS[way](model)
    row = QwenVLCollator(places=MediaPlaces.of(model))(samples)
    found, grads = gradients(model, [row])
    assert found == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 2 * gradient_tolerance(name) * float(gradient.abs().max()) + 1e-7
        assert float((grads[name] - gradient).abs().max()) <= tolerance, name


@pytest.mark.parametrize("way", WAYS)
def test_without_restarts_no_way_gives_them(checkpoints, samples, way, monkeypatch):
    monkeypatch.setattr(delta_net._Restarting, "_fold", lambda self, mixer, hidden: None)
    model = load_model(checkpoints["qwen3_5"], torch_dtype="float32", attn_impl="sdpa").train()
    _, expected = gradients(model, [QwenVLCollator()([sample]) for sample in samples])
    model = WAYS[way](model)
    _, grads = gradients(model, [QwenVLCollator(places=MediaPlaces.of(model))(samples)])
    name = next(name for name in expected if name.endswith("conv1d.weight"))
    assert not torch.allclose(grads[name], expected[name], rtol=1e-2)


def test_the_kinds_of_layers_fit_the_config_after_blocks_are_added(checkpoints):
    model = expanded(load_model(checkpoints["qwen3_5"], torch_dtype="float32", attn_impl="sdpa"))
    kinds = model.config.get_text_config().layer_types
    layers = model.model.language_model.layers
    assert [hasattr(layer, "linear_attn") for layer in layers] == [kind == "linear_attention" for kind in kinds]
    for index in new_blocks(model):
        restarting = layers[index].linear_attn if hasattr(layers[index], "linear_attn") else None
        if restarting is not None:
            assert delta_net.MARK in vars(layers[index])
            (own,) = (hook.__self__ for hook in restarting._forward_hooks.values())
            (below,) = (hook.__self__ for hook in layers[index - 1].linear_attn._forward_hooks.values())
            assert own is not below, "a copy must have a state of its own"


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_mixed_precision_is_isolated(checkpoints, samples, kind):
    """Under autocast to bfloat16, another first sample changes no bit of the others' loss."""
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa").train()

    def logits(first):
        row = QwenVLCollator(places=MediaPlaces.of(model))([first, *samples[1:]])
        row.pop("sources"), row.pop("labels")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return model(**row).logits[0, len(first["input_ids"]) :]

    other = dict(samples[0], input_ids=samples[0]["input_ids"].clone())
    other["input_ids"][-3:] = 5
    assert torch.equal(logits(samples[0]), logits(other))
    changed = [QwenVLCollator()([sample])["input_ids"] for sample in (samples[0], other)]
    assert not torch.equal(*changed), "vacuous: the same sample"


def test_compiling_them_is_refused_in_one_line(checkpoints):
    model = load_model(checkpoints["qwen3_5"], torch_dtype="float32", attn_impl="sdpa")
    with pytest.raises(RecipeError, match=r"gated delta nets of qwen3_5\. Set training\.torch_compile=false") as caught:
        compile_layers(model, backend="aot_eager")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["torch_compile=true", "torch_compile_backend=aot_eager"])
def test_compiling_them_is_refused_before_weights_are_loaded(checkpoints, key):
    def tried(kind):
        try_model(load_recipe(None, [f"model.model={checkpoints[kind]}", f"training.{key}"]))

    with pytest.raises(RecipeError, match=r"gated delta nets of qwen3_5\."):
        tried("qwen3_5")
    tried("dense")
