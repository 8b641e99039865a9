"""Only the chosen parts are quantised, their values are bitsandbytes' own, and adapters train over them."""

import pytest
import torch
from cases import FOR_4_BITS, MOST_KINDS, make_kind
from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.quantization import quantized_modules
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.methods import over_quantized
from qwenvl_ft.recipe.schema import QuantizationConfig

bnb = pytest.importorskip("bitsandbytes")
SETTINGS = {
    "nf4": {"quantization_bit": 4},
    "fp4": {"quantization_bit": 4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"quantization_bit": 8},
}
"""Return the section's settings; 4 bits are computed in float32 here, for exact comparison."""


@pytest.fixture
def quantized(checkpoints):
    def load(name="nf4", kind="dense", checkpoint=None, **more):
        settings = SETTINGS[name] | more
        if settings["quantization_bit"] == 4:
            settings |= {"bnb_4bit_comp_dtype": "float32"}
        section = QuantizationConfig(**settings)
        folder = checkpoint or checkpoints[kind]
        return load_model(folder, torch_dtype="float32", attn_impl="sdpa", quantization=section).eval()

    return load


@pytest.fixture(scope="module")
def batch(encoder, mixed_records):
    from qwenvl_ft.data.collate import QwenVLCollator

    row = QwenVLCollator()([encoder(mixed_records[0])])
    return {key: value for key, value in row.items() if key not in ("labels", "sources")}


KEPT_WHOLE = ("lm_head", "in_proj_a", "in_proj_b", "shared_expert_gate")
"""Linear layers that are never quantised."""


def linears(model, *parts):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(KEPT_WHOLE) and part_of(name) in parts
    }


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_language_model_alone_is_quantised(quantized, name, kind):
    model = quantized(name, kind)
    assert set(quantized_modules(model)) == linears(model, "llm")
    of_its_kind = bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit
    assert all(isinstance(model.get_submodule(module), of_its_kind) for module in quantized_modules(model))
    others = {
        key: value.dtype
        for key, value in model.named_parameters()
        if key.rpartition(".")[0] not in linears(model, "llm")
    }
    assert set(others.values()) == {torch.float32}
    assert "lm_head.weight" in others or not kind.endswith("moe")
    assert any("in_proj_a" in key for key in others) == kind.startswith("qwen3_5")


@pytest.mark.parametrize("parts", [["vision"], ["merger"], ["vision", "llm"], ["vision", "merger", "llm"]])
def test_named_parts_are_quantised(quantized, parts):
    model = quantized(quantized_parts=parts)
    assert set(quantized_modules(model)) == linears(model, *parts)


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_compute_with_the_nearest_of_sixteen_values(quantized, tmp_path, batch, name, kind):
    """By hand: two weights per byte, each one of 16 values times the largest of its block of 64."""
    checkpoint = make_kind(tmp_path, kind, **FOR_4_BITS)
    model = quantized(name, checkpoint=checkpoint, bnb_4bit_use_double_quant=False)
    plain = load_model(checkpoint, torch_dtype="float32", attn_impl="sdpa").eval()
    with torch.no_grad():
        base = plain(**batch).logits
        for module in quantized_modules(model):
            packed = model.get_submodule(module).weight
            code, scales = packed.quant_state.code.float(), packed.quant_state.absmax
            weight = plain.get_submodule(module).weight
            blocks = weight.flatten().view(-1, 64)
            torch.testing.assert_close(scales, blocks.abs().amax(dim=1))
            chosen = torch.cat([packed.flatten()[:, None] >> 4, packed.flatten()[:, None] & 15], dim=1).view(-1, 64)
            found = code[chosen.long()] * scales[:, None]
            nearest = (blocks / scales[:, None])[..., None].sub(code).abs().amin(dim=-1) * scales[:, None]
            assert ((found - blocks).abs() <= nearest + 0.02 * scales[:, None]).all()
            weight.copy_(found.view_as(weight))
        # In evaluation bitsandbytes multiplies in bfloat16 on some CPUs, whatever its setting is.
        torch.testing.assert_close(model.train()(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(**batch).logits, base, atol=1e-2), "vacuous: quantising changes nothing"


def test_the_computing_dtype_and_double_quantisation_are_those_of_the_recipe(checkpoints):
    section = QuantizationConfig(quantization_bit=4, bnb_4bit_comp_dtype="float16")
    model = load_model(checkpoints["dense"], torch_dtype="bfloat16", attn_impl="sdpa", quantization=section)
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float16
    assert layer.weight.quant_state.nested
    assert model.model.visual.blocks[0].mlp.linear_fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("name", ["nf4", *(pytest.param(name, marks=pytest.mark.soak) for name in ("fp4", "int8"))])
@pytest.mark.parametrize("train_type", over_quantized())
def test_an_adapter_trains_over_it_saves_and_loads(quantized, batch, tmp_path, name, kind, train_type):
    from peft import PeftModel

    from qwenvl_ft.recipe.schema import TunerConfig
    from qwenvl_ft.tuning.optimizer import param_groups
    from qwenvl_ft.tuning.prepare import prepare_model

    torch.manual_seed(0)
    model = prepare_model(
        quantized(name, kind), TunerConfig(train_type=train_type, lora_dropout=0.0, fourier_n_frequency=200)
    )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, learning_rate=2e-3))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        logits = model.train()(**batch).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) != value.requires_grad, key
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(name, kind), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("name", "tolerance"), [("nf4", 1e-4), ("int8", 0.05)])
def test_packed_equals_alone(quantized, encoder, mixed_records, name, tolerance):
    """LLM.int8() separates columns with outliers, found over the whole row, so results are close but not equal."""
    from qwenvl_ft.data.collate import QwenVLCollator

    def logits(samples):
        row = QwenVLCollator()(samples)
        return model(**{key: value for key, value in row.items() if key not in ("labels", "sources")}).logits

    samples = [encoder(mixed_records[i]) for i in (0, 1, 2)]
    model = quantized(name)
    with torch.no_grad():
        alone = torch.cat([logits([sample]) for sample in samples], dim=1)
        torch.testing.assert_close(logits(samples), alone, rtol=0, atol=tolerance)


REFUSALS = {
    "tuner.train_type=full": "train_type=full does not work over a quantised model",
    "tuner.train_type=llamapro": "train_type=llamapro does not work over a quantised model",
    "tuner.init_weights=OLoRA": "init_weights=olora changes the base weights",
    "tuner.train_type=loha": "train_type=loha does not work over a quantised model",
    "deepspeed.enabled=true deepspeed.config=zero3": "cannot be sharded by deepspeed.config=zero3",
}


@pytest.mark.parametrize("given", REFUSALS)
def test_what_cannot_be_together_is_one_line(given):
    with pytest.raises(RecipeError, match=REFUSALS[given]):
        load_recipe(None, ["quantization.quantization_bit=4", *given.split()])


def test_keys_without_bits_are_errors():
    with pytest.raises(RecipeError, match=r"bnb_4bit_quant_type=.* is not read with .*quantization_bit=4\."):
        load_recipe(None, ["quantization.bnb_4bit_quant_type=fp4", "quantization.quantization_bit=8"])
    with pytest.raises(RecipeError, match=r"quantized_parts=.* is not read with .*quantization_bit=4 or 8"):
        load_recipe(None, ["quantization.quantized_parts=[vision]"])


def test_quantised_weights_and_modules_are_not_trained_in_full(quantized):
    from qwenvl_ft.recipe.schema import TunerConfig
    from qwenvl_ft.tuning.prepare import prepare_model

    with pytest.raises(RecipeError, match=r"train_type=full does not work with .*, and those of llm are quantised"):
        prepare_model(quantized(), TunerConfig(train_type="full"))
    with pytest.raises(RecipeError, match=r"'model.language_model.layers.1.mlp' in full, but .*gate_proj is quantised"):
        prepare_model(quantized(), TunerConfig(modules_to_save=["layers.1.mlp"]))
    model = prepare_model(quantized(), TunerConfig(modules_to_save=["model.visual.merger"]))
    assert any(".modules_to_save." in name for name, value in model.named_parameters() if value.requires_grad)


def test_dora_over_few_bits_is_for_gpus(quantized):
    from qwenvl_ft.recipe.schema import TunerConfig
    from qwenvl_ft.tuning.prepare import prepare_model

    for name in ("nf4", "int8"):
        with pytest.raises(RecipeError, match=r"tuner.use_dora needs norms .* on a CPU"):
            prepare_model(quantized(name), TunerConfig(use_dora=True))


def test_a_quantised_checkpoint_is_not_quantised_again(quantized, tmp_path):
    quantized().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="the model is quantised already, by bitsandbytes"):
        load_model(tmp_path, quantization=QuantizationConfig(quantization_bit=4))
    again = load_model(tmp_path, torch_dtype="float32")
    assert quantized_modules(again)


def test_the_flags_of_the_guides_are_understood():
    command = (
        "--quantization_bit 4 --bnb_4bit_comp_dtype float16 --bnb_4bit_quant_type fp4 --bnb_4bit_use_double_quant false"
    )
    found = recipe_from_argv(command.split()).quantization
    assert found == QuantizationConfig(
        quantization_bit=4,
        bnb_4bit_comp_dtype="float16",
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
    )
    default = recipe_from_argv(["--quantization_bit", "4"]).quantization
    assert (default.bnb_4bit_comp_dtype, default.bnb_4bit_quant_type) == ("bfloat16", "nf4")
    assert default.bnb_4bit_use_double_quant
