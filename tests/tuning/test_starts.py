"""LoRA's initialisations equal peft's own results or the formula, and their checkpoints fit the original model."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, preprocess_loraga
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import QuantizationConfig
from qwenvl_ft.tuning.prepare import prepare_model, trainable_table
from qwenvl_ft.tuning.targets import adapter_targets, parameter_targets

CHANGED = {
    "pissa": {"init_weights": "pissa"},
    "olora": {"init_weights": "olora", "use_rslora": True},
    "pissa by pattern": {"init_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 4}},
    "pissa and dora": {"init_weights": "pissa", "use_dora": True},
}


@pytest.fixture
def batches(batch):
    """Return a batch with labels, with the collator's keys."""
    return [{**batch, "labels": torch.where(batch["input_ids"] > 511, -100, batch["input_ids"])}]


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_base_is_saved_as_an_adapter_of_the_original(fresh, tuner, train, logits, tmp_path, name):
    """Compared with peft's own conversion where it has one (no DoRA, no patterns with rslora)."""
    settings = CHANGED[name]
    model = prepare_model(fresh(), tuner(**settings))
    weight = "model.language_model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(weight)
    assert not torch.equal(layer.get_base_layer().weight, fresh().get_submodule(weight).weight), "vacuous: base kept"
    config = copy.deepcopy(model.peft_config["default"])
    trained = logits(train(model))
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].r == tuner(**settings).lora_rank, "saving must not change what trains"
    if "use_dora" in settings:
        return
    reference = get_peft_model(fresh(), config)
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "start")
    train(reference)
    reference.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


def test_peft_alone_would_save_what_fits_no_other_base(fresh, tuner, train, logits, tmp_path):
    """The conversion is necessary: the raw update on the original model computes something else."""
    model = train(prepare_model(fresh(), tuner(init_weights="pissa")))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (16, 64, True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in state if "q_proj.lora_B" in key)
    assert state[key].shape[1] == 16
    half = state[key][:, 8:] @ state[key.replace("lora_B", "lora_A")][8:]
    assert float(half.norm()) > 0.1, "vacuous: nothing was taken out of the base"


def test_another_start_is_put_back_exactly_where_the_checkpoint_left_it(fresh, tuner, train, logits, tmp_path):
    """A resumed run may have drawn another initialisation; the base weights then follow the checkpoint's."""
    settings = tuner(init_weights="pissa_niter_1", lora_rank=4)
    torch.manual_seed(0)
    model = train(prepare_model(fresh(), settings))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = prepare_model(fresh(), settings)
    key = next(key for key in model.start if "lora_A" in key)
    assert not torch.equal(other.start[key], model.start[key]), "vacuous: the same draw"
    other.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    named = dict(other.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in model.named_parameters() if value.requires_grad)
    with pytest.raises(RecipeError, match=r"has rank 4 at .* but tuner.lora_rank gives 8"):
        prepare_model(fresh(), tuner(init_weights="pissa")).load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("scale", ["gd", "unit", "stable", "weightS"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_starts_as_peft_does_from_the_same_gradient(fresh, tuner, logits, batches, direction, scale):
    from peft import LoraGAConfig

    settings = tuner(
        init_weights="lora-ga",
        lora_ga_direction=direction,
        lora_ga_scale=scale,
        lora_ga_stable_gamma=8,
        lora_rank=2,
        target_modules=["q_proj", "linear_fc2"],
    )
    torch.manual_seed(0)
    model = prepare_model(fresh(), settings, batches=batches)
    if (direction, scale) != ("random", "weightS"):  # peft divides by a singular value that may be next to nothing
        torch.testing.assert_close(logits(model), logits(fresh()), rtol=1e-4, atol=1e-5)
    names = {"gd": "gd_scale", "weightS": "weight_svd"}
    ga_config = LoraGAConfig(direction=direction, scale=names.get(scale, scale), stable_gamma=8)
    config = LoraConfig(
        r=2,
        lora_alpha=32,
        target_modules=adapter_targets(fresh(), settings),
        init_lora_weights="lora_ga",
        lora_ga_config=ga_config,
    )
    base = fresh()

    def step():
        inputs = {key: value for key, value in batches[0].items() if key != "labels"}
        logits = base(**inputs).logits[0, :-1]
        labels = batches[0]["labels"][0, 1:]
        torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).backward()

    torch.manual_seed(0)
    preprocess_loraga(base, config, step)
    reference = get_peft_model(base, config)
    ours = dict(model.named_parameters())
    for name, value in reference.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


def test_eva_hands_ranks_to_layers_and_starts_with_the_directions_of_their_inputs(fresh, tuner, logits, batches):
    settings = tuner(init_weights="eva", lora_rank=4, target_modules=["q_proj", "down_proj"])
    model = prepare_model(fresh(), settings, batches=batches)
    torch.testing.assert_close(logits(model), logits(fresh()))
    config = model.peft_config["default"]
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {name: module.r["default"] for name, module in layers.items()}
    assert len(set(ranks.values())) > 1, "vacuous: all ranks are equal"
    assert sum(ranks.values()) == 4 * 8
    assert set(config.rank_pattern.values()) <= set(ranks.values())
    layer = next(iter(layers.values()))
    seen = []
    hook = layer.get_base_layer().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    logits(model)
    hook.remove()
    states = seen[0] - seen[0].mean(0)
    directions = torch.linalg.svd(states, full_matrices=False)[2]
    cosine = torch.nn.functional.cosine_similarity(layer.lora_A["default"].weight[0], directions[0], dim=0)
    assert abs(float(cosine)) > 0.99
    assert all(module.lora_A["default"].weight.requires_grad for module in layers.values())


def test_eva_that_cannot_settle_is_given_up(fresh, tuner, batches):
    with pytest.raises(RecipeError, match=r"eva did not converge in 20 rounds over 1 batches"):
        prepare_model(fresh(), tuner(init_weights="eva", lora_rank=32, eva_rho=2.0), batches=batches)


def test_loftq_makes_up_for_what_four_bits_lost(tiny_dir, tuner, logits, tmp_path):
    """The update is the best of its rank for W - Q, at the adapter's scale, and its checkpoint fits the 4-bit model."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    def quantised():
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["visual", "lm_head"]
        )
        return AutoModelForImageTextToText.from_pretrained(tiny_dir, quantization_config=four_bits, dtype=torch.float32)

    settings = tuner(init_weights="loftq", lora_alpha=16, freeze_vit=True, freeze_aligner=True)
    model = prepare_model(quantised(), settings)
    whole = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa")
    name = "model.language_model.layers.1.mlp.down_proj"
    layer, weight = model.get_base_model().get_submodule(name), whole.get_submodule(name).weight
    stored = layer.get_base_layer().weight
    lost = weight - dequantize_4bit(stored.data, stored.quant_state).float()
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    best = torch.linalg.svdvals(lost)[8:].norm()
    torch.testing.assert_close((lost - update).norm(), best, rtol=1e-4, atol=1e-5)
    exact, before, after = logits(whole), logits(quantised()), logits(model)
    assert (after - exact).norm() < (before - exact).norm(), "vacuous: nothing was made up for"
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(quantised(), tmp_path)), after)
    with pytest.raises(RecipeError, match=r"no adapted layer is in 4 bits"):
        prepare_model(load_model(tiny_dir, torch_dtype="float32"), settings)


@pytest.mark.parametrize("settings", [{"init_weights": "olora"}, {"train_type": "adalora"}])
def test_weights_that_zero_3_has_cut_are_refused_where_whole_ones_are_needed(fresh, tuner, settings):
    model = fresh()
    first = next(model.parameters())
    first.ds_shape = first.shape  # as deepspeed marks them
    with pytest.raises(RecipeError, match=r"needs whole weights, but ZeRO-3 has sharded them"):
        prepare_model(model, tuner(**settings))
    assert prepare_model(model, tuner())


def test_starts_that_cannot_be_honoured_say_so(fresh, tuner, batches):
    cases = [
        ({"init_weights": "lora-ga"}, r"init_weights=lora-ga looks at data"),
        ({"init_weights": "pisa"}, r"unknown tuner.init_weights 'pisa'. Did you mean 'pissa'"),
        ({"rank_pattern": {"q_projj": 4}}, r"tuner.rank_pattern names 'q_projj'.*A target: model"),
        ({"alpha_pattern": {"layers.99.*": 4}}, r"tuner.alpha_pattern names 'layers.99"),
    ]
    for settings, words in cases:
        with pytest.raises(RecipeError, match=words):
            prepare_model(fresh(), tuner(**settings))
    with pytest.raises(RecipeError, match=r"eva_rho=0.5 is below 1"):
        prepare_model(fresh(), tuner(init_weights="eva", eva_rho=0.5), batches=batches)


def test_patterns_set_rank_and_scale_of_the_layers_they_name(fresh, tuner):
    settings = tuner(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3}, alpha_pattern={"q_proj": 10})
    model = prepare_model(fresh(), settings).get_base_model()
    layers = model.model.language_model.layers
    found = {name: m.r["default"] for name, m in layers.named_modules() if hasattr(m, "lora_A")}
    assert {rank for name, rank in found.items() if "q_proj" in name} == {2}
    assert [name for name, rank in found.items() if rank == 3] == ["1.mlp.down_proj"]
    assert layers[0].self_attn.q_proj.scaling["default"] == 10 / 2
    assert layers[0].self_attn.k_proj.scaling["default"] == 32 / 8


def test_lora_dtype_holds_the_adapter_and_nothing_else(fresh, tuner):
    from qwenvl_ft.assemble import keep_float32

    settings = tuner(lora_dtype="bfloat16", modules_to_save=["model.visual.merger"])
    model = prepare_model(fresh(torch_dtype="bfloat16"), settings)
    keep_float32(model, keep_adapter=True)
    dtypes = {".lora_" in name: value.dtype for name, value in model.named_parameters() if value.requires_grad}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_in_16_bits_is_what_is_taken_out_of_the_base(fresh, tuner, train, tmp_path, start):
    """The dtype of the weights; activations of such a layer are rounded to 16 bits too."""
    base, model = fresh(), prepare_model(fresh(), tuner(init_weights=start, lora_dtype="bfloat16"))
    name = "model.language_model.layers.1.mlp.down_proj"
    layer, whole = model.get_base_model().get_submodule(name), base.get_submodule(name).weight

    def weight(layer):
        a, b = (factor["default"].weight.float() for factor in (layer.lora_A, layer.lora_B))
        return layer.get_base_layer().weight + layer.scaling["default"] * b @ a

    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight(layer), whole, rtol=0, atol=1e-6)
    train(model).save_pretrained(tmp_path)
    trained = weight(layer)
    assert float((trained - whole).abs().max()) > 1e-2, "vacuous: nothing was learnt"
    opened = PeftModel.from_pretrained(fresh(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(weight(opened.get_base_model().get_submodule(name)), trained, rtol=0, atol=1e-6)


def test_lora_dtype_holds_where_eva_gives_layers_other_ranks(fresh, tuner, batches):
    settings = tuner(init_weights="EVA", lora_dtype="bfloat16", lora_rank=4, eva_rho=2.0)
    model = prepare_model(fresh(), settings, batches=batches * 4)
    lora = [value for name, value in model.named_parameters() if ".lora_" in name]
    assert {value.dtype for value in lora} == {torch.bfloat16}
    assert len({len(value) for name, value in model.named_parameters() if ".lora_A." in name}) > 1, "vacuous"


def test_dropout_of_a_start_that_is_part_of_the_base_is_warned_of(fresh, tuner, caplog):
    for start, share, warned in (("pissa", 0.05, True), ("pissa", 0.0, False), (True, 0.05, False)):
        caplog.clear()
        prepare_model(fresh(), tuner(init_weights=start, lora_dropout=share))
        assert ("drops parts of the base model itself" in caplog.text) == warned


def test_a_start_takes_no_more_directions_than_a_layer_has(fresh, tuner, batches):
    for start, rank in (("pissa", 65), ("olora", 65), ("lora-ga", 33)):
        with pytest.raises(
            RecipeError, match=rf"init_weights={start} with rank {rank} needs .* directions of .*, which has "
        ):
            prepare_model(fresh(), tuner(init_weights=start, lora_rank=rank), batches=batches)
    assert prepare_model(fresh(), tuner(init_weights="pissa", lora_rank=65, rank_pattern={".*": 8}))


@pytest.mark.parametrize("start", ["pissa", "olora", "lora-ga", "loftq"])
def test_starts_over_a_model_in_few_bits_on_the_disk_are_refused(tiny_dir, tuner, batches, tmp_path, start):
    pytest.importorskip("bitsandbytes")
    quantization = QuantizationConfig(quantization_bit=4)
    load_model(tiny_dir, torch_dtype="float32", quantization=quantization).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch_dtype="float32")
    with pytest.raises(RecipeError, match=rf"tuner.init_weights={start} .* quantised"):
        prepare_model(model, tuner(init_weights=start), batches=batches)


def test_all_linear_takes_the_experts_and_says_what_they_cost(fresh, tuner):
    settings = tuner(lora_dropout=0.1)
    model = prepare_model(fresh("moe"), settings)
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 2 * 4
    dropouts = {type(m.lora_dropout["default"]).__name__ for m in model.modules() if hasattr(m, "lora_dropout")}
    assert dropouts == {"Dropout", "Identity"}
    text = model.config.text_config
    width, inner = text.hidden_size, text.moe_intermediate_size
    count = 4 * text.num_experts * 8 * ((width + 2 * inner) + (inner + width))
    assert f"experts: {count:,} of the LoRA weights; tuner.target_parameters=[]" in trainable_table(
        model, {"llm": 1e-4, "vision": 1e-4, "merger": 1e-4}
    )
    without = prepare_model(fresh("moe"), tuner(target_parameters=[]))
    assert not any(isinstance(module, ParamWrapper) for module in without.modules())


def test_experts_and_router_by_name(fresh, tuner):
    model = fresh("moe")
    assert parameter_targets(model, tuner(target_parameters=["layers.1.mlp.experts.down_proj", "mlp.gate.weight"])) == [
        "model.language_model.layers.0.mlp.gate.weight",
        "model.language_model.layers.1.mlp.experts.down_proj",
        *(f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in (1, 2, 3)),
    ]
    assert parameter_targets(model, tuner(target_modules=["q_proj"])) == []
    assert parameter_targets(fresh(), tuner()) == []
    for settings, words in [
        ({"target_parameters": ["experts.gate_proj"]}, r"names 'experts.gate_proj', which is not a weight of experts"),
        ({"target_parameters": ["experts.down_proj"], "freeze_llm": True}, r"which the recipe freezes"),
        ({"target_parameters": ["experts.down_proj"], "use_dora": True}, r"peft supports neither use_dora"),
    ]:
        with pytest.raises(RecipeError, match=words):
            parameter_targets(model, tuner(**settings))


def test_experts_that_a_start_cannot_reach_are_said_to_be_left_out(fresh, tuner, caplog):
    with caplog.at_level(logging.WARNING):
        prepare_model(fresh("moe"), tuner(use_dora=True))
    assert "all-linear leaves the experts out" in caplog.text
