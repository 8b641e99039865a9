"""For train types that are peft configs, our keys reach peft's fields, and errors name unsupported layers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.export.merge import merge
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.methods import METHODS
from qwenvl_ft.tuning.prepare import prepare_model

WRITTEN = {
    "vera": (
        {"vera_rank": 8, "vera_dropout": 0.1, "vera_d_initial": 0.2},
        {"peft_type": "VERA", "r": 8, "vera_dropout": 0.1, "d_initial": 0.2},
    ),
    "boft": (
        {"boft_block_size": 8, "boft_dropout": 0.1},
        {"peft_type": "BOFT", "boft_block_size": 8, "boft_n_butterfly_factor": 1, "boft_dropout": 0.1},
    ),
    "fourierft": (
        {"fourier_n_frequency": 100, "fourier_scaling": 150.0},
        {"peft_type": "FOURIERFT", "n_frequency": 100, "scaling": 150.0},
    ),
    "bone": ({"bone_rank": 16, "bone_init": "bat"}, {"peft_type": "MISS", "r": 16, "init_weights": "bat"}),
    "oft": ({"peft_options": {"oft_block_size": 8}}, {"peft_type": "OFT", "oft_block_size": 8}),
    "adalora": (
        {
            "adalora_target_r": 4,
            "adalora_init_r": 10,
            "adalora_tinit": 5,
            "adalora_tfinal": 7,
            "adalora_deltaT": 3,
            "adalora_beta1": 0.7,
            "adalora_beta2": 0.6,
            "adalora_orth_reg_weight": 0.25,
        },
        {
            "peft_type": "ADALORA",
            "target_r": 4,
            "init_r": 10,
            "tinit": 5,
            "tfinal": 7,
            "deltaT": 3,
            "beta1": 0.7,
            "beta2": 0.6,
            "orth_reg_weight": 0.25,
        },
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_our_keys_are_in_the_saved_config(fresh, tuner, tmp_path, name):
    settings, expected = WRITTEN[name]
    model = prepare_model(fresh(), tuner(train_type=name, target_modules=["q_proj"], **settings))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: written[key] for key in expected} == expected


def test_vera_shares_matrices_as_large_as_the_largest_layer(fresh, tuner):
    model = prepare_model(fresh(), tuner(train_type="vera", vera_rank=16)).base_model
    layers = [module for module in model.modules() if hasattr(module, "vera_lambda_d")]
    assert len({(layer.in_features, layer.out_features) for layer in layers}) > 3, "vacuous: all are alike"
    assert model.vera_A["default"].shape == (16, max(layer.in_features for layer in layers))
    assert model.vera_B["default"].shape == (max(layer.out_features for layer in layers), 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_type": "boft", "boft_block_size": 5}, r"\d+ wide, which tuner.boft_block_size=5 does not divide"),
        ({"train_type": "boft", "boft_block_num": 7}, r"tuner.boft_block_num=7 does not divide"),
        ({"train_type": "boft", "boft_block_num": 7, "boft_block_size": 8}, r"both set the blocks"),
        ({"train_type": "boft", "boft_block_size": 0}, r"boft_block_size=0 needs tuner.boft_block_num"),
        ({"train_type": "fourierft", "fourier_n_frequency": 10**6}, r"frequencies, fewer than tuner.fourier_n_freq"),
        ({"train_type": "bone", "bone_rank": 7, "bone_init": "bat"}, r"tuner.bone_rank=7 does not divide"),
        ({"train_type": "oft", "peft_options": {"oft_blocksize": 8}}, r"no such field. Did you mean 'oft_block_size'"),
        ({"train_type": "oft", "peft_options": {"target_modules": ["x"]}}, r"peft_options.target_modules: .*no such"),
        ({"train_type": "c3a", "peft_options": {"block_size": 48}}, r"tuner.train_type=c3a does not fit the model"),
        ({"train_type": "hira", "target_regex": "^$", "modules_to_save": ["visual.merger"]}, r"has no layer to adapt"),
    ],
)
def test_what_does_not_fit_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), tuner(**settings))
    assert "\n" not in str(caught.value)


def test_butterfly_factors_that_peft_would_drop_are_refused(fresh, tuner):
    if torch.cuda.is_available():
        pytest.skip("the extension may be there")
    with pytest.raises(RecipeError, match=r"boft_n_butterfly_factor=2 needs peft's CUDA extension"):
        prepare_model(fresh(), tuner(train_type="boft", boft_n_butterfly_factor=2))


@pytest.mark.parametrize("name", METHODS)
def test_every_train_type_has_functions_and_keys_that_exist(name):
    method = METHODS[name]
    assert callable(method.build)
    assert method.names is None or callable(method.names)
    assert method.check is None or callable(method.check)
    assert set(method.keys) <= own_types("tuner").keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tuner.train_type=vera", "tuner.lora_rank=4"], r"lora_rank=4 is not read with tuner.train_type=vera"),
        (["tuner.vera_rank=4"], r"vera_rank=4 is not read with tuner.train_type=lora.*train_type=vera"),
        (
            ["tuner.train_type=boft", "tuner.peft_options={r: 4}"],
            r"peft_options=.* is not read with tuner.train_type=boft",
        ),
        (["tuner.lora_ga_iters=4"], r"lora_ga_iters=4 is not read with tuner.init_weights=true.*init_weights=lora-ga"),
        (["tuner.init_weights=pissa", "tuner.eva_rho=1.5"], r"eva_rho=1.5 is not read with tuner.init_weights=pissa"),
        (["tuner.init_weights=pissa", "quantization.quantization_bit=4"], r"pissa changes the base weights"),
        (["tuner.adalora_beta1=1"], r"adalora_beta1: 1 must be above 0 and below 1"),
    ],
)
def test_a_key_that_nothing_reads_is_an_error(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(None, overrides)


def test_defaults_are_the_guides():
    defaults = load_recipe(None, []).tuner
    assert (defaults.adalora_target_r, defaults.adalora_init_r, defaults.adalora_deltaT) == (8, 12, 1)
    assert (defaults.adalora_tinit, defaults.adalora_tfinal, defaults.adalora_orth_reg_weight) == (0, 0, 0.5)
    assert (defaults.adalora_beta1, defaults.adalora_beta2) == (0.85, 0.85)
    assert (defaults.boft_block_size, defaults.boft_block_num, defaults.boft_n_butterfly_factor) == (4, 0, 1)
    assert (defaults.vera_rank, defaults.vera_dropout, defaults.vera_d_initial, defaults.boft_dropout) == (
        256,
        0.0,
        0.1,
        0.0,
    )
    assert (defaults.lora_ga_batch_size, defaults.lora_ga_iters, defaults.lora_ga_max_length) == (2, 2, 1024)
    assert (defaults.lora_ga_direction, defaults.lora_ga_scale, defaults.lora_ga_stable_gamma) == (
        "ArB2r",
        "stable",
        16,
    )
    assert (defaults.lora_rank, defaults.lora_alpha, defaults.lora_dropout, defaults.init_weights) == (
        8,
        32,
        0.05,
        True,
    )


def test_places_of_sparse_weights_that_peft_keeps_beside_the_state_are_no_strange_keys(
    fresh, tuner, train, logits, tmp_path
):
    settings = tuner(train_type="shira", target_modules=["q_proj"], peft_options={"r": 4})
    model = train(prepare_model(fresh(), settings))
    model.save_pretrained(tmp_path / "adapter")
    assert any(key.endswith(".shira_indices") for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    merged = load_model(merge(tmp_path / "adapter", tmp_path / "merged").folder, torch_dtype="float32")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
