"""A second stage continues a first one's adapter, and saves one adapter that plain peft loads on the base model."""

import json
import shutil

import pytest
import torch
from cases import KINDS, MOST_KINDS
from peft import PeftModel
from safetensors.torch import load_file

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.tuning.prepare import prepare_model

MERGERS = [
    "model.visual.merger",
    *(f"model.visual.deepstack_merger_list.{index}" for index in range(3)),
]
ALIGNER = {"freeze_llm": True, "freeze_vit": True, "lora_rank": 4, "lora_alpha": 8}
WIDER = {"freeze_vit": True, "lora_rank": 2, "lora_alpha": 32}
FIRST = {
    "lora": ALIGNER,
    "dora": ALIGNER | {"use_dora": True},
    "rslora with patterns": ALIGNER | {"use_rslora": True, "rank_pattern": {"linear_fc1": 3}},
    "pissa": ALIGNER | {"init_weights": "pissa"},
    "full mergers": ALIGNER | {"target_regex": "^$", "modules_to_save": MERGERS},
    "one full merger": ALIGNER | {"modules_to_save": MERGERS[:1]},
}
"""First stages, which train the aligner only."""
SECOND = {
    "lora": WIDER,
    "dora": WIDER | {"use_dora": True},
    "rslora with patterns": WIDER | {"use_rslora": True},
    "pissa": WIDER,
    "full mergers": WIDER,
    "one full merger": WIDER | {"modules_to_save": MERGERS[:1]},
}
"""Second stages, which train the language model too."""
AGAIN = {
    "adalora": {"adalora_init_r": 6, "adalora_target_r": 3},
    "vera": {},
    "boft": {},
    "fourierft": {"fourier_n_frequency": 50},
    "bone": {"bone_rank": 4},
    "oft": {"peft_options": {"r": 0, "oft_block_size": 4}},
    "adapter": {"adapter_length": 8},
    "reft": {"freeze_vit": True, "freeze_aligner": True},
    "longlora": {"longlora_group_size": 16},
}
"""Methods that both stages use with the same settings."""
every_stage = pytest.mark.parametrize("name", FIRST)
both_kinds = pytest.mark.parametrize("kind", MOST_KINDS)


@pytest.fixture
def staged(fresh, tuner, train, logits, tmp_path):
    """Train and save a first stage and prepare the second; return (folder, first logits, second model)."""

    def make(first, second, kind="dense"):
        torch.manual_seed(0)
        model = train(prepare_model(fresh(kind), tuner(**first)))
        folder = tmp_path / "stage_1"
        model.save_pretrained(folder)
        torch.manual_seed(1)
        again = prepare_model(fresh(kind), tuner(**second, resume_from_checkpoint=str(folder)))
        return folder, logits(model), again

    return make


def keys(folder):
    return set(load_file(folder / "adapter_model.safetensors"))


def values(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@every_stage
def test_the_second_stage_begins_where_the_first_ended(staged, fresh, logits, name, kind):
    _, first, model = staged(FIRST[name], SECOND[name], kind)
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(fresh(kind)), first, atol=1e-3), "vacuous: the first stage changes nothing"
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any(".language_model." in name for name in trained)
    assert any(".merger." in name for name in trained)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@every_stage
def test_one_adapter_comes_out_and_plain_peft_loads_it_on_the_base(staged, fresh, train, logits, tmp_path, name, kind):
    folder, first, model = staged(FIRST[name], SECOND[name], kind)
    trained = logits(train(model))
    assert not torch.allclose(trained, first, atol=1e-3), "vacuous: the second stage changes nothing"
    model.save_pretrained(tmp_path / "stage_2")
    before, first_keys = json.loads((folder / "adapter_config.json").read_text()), keys(folder)
    shutil.rmtree(folder)
    again = PeftModel.from_pretrained(fresh(kind), tmp_path / "stage_2")
    assert torch.equal(logits(again), trained)
    written = json.loads((tmp_path / "stage_2" / "adapter_config.json").read_text())
    assert set(before["modules_to_save"] or []) <= set(written["modules_to_save"] or [])
    assert first_keys < keys(tmp_path / "stage_2")
    assert any(".language_model." in key for key in keys(tmp_path / "stage_2") - first_keys)


def test_experts_of_the_first_stage_go_along_into_one_without_any(staged, fresh, train, logits, tmp_path):
    """The second stage alone would have dropout, but peft supports none for the experts of the first."""
    aligner = {"freeze_llm": True, "freeze_vit": True, "lora_dropout": 0.1}
    _, first, model = staged({"lora_rank": 4}, aligner, "moe")
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
    assert any(".experts." in name for name, _ in model.named_parameters() if ".lora_" in name)
    kinds = {type(m.lora_dropout["default"]) for n, m in model.named_modules() if n.endswith("merger.linear_fc1")}
    assert kinds == {torch.nn.Dropout}
    trained = logits(train(model))
    model.save_pretrained(tmp_path / "stage_2")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh("moe"), tmp_path / "stage_2")), trained)


@pytest.mark.parametrize("name", ["vera", "tinylora", "randlora"])
def test_adapters_with_shared_weights_take_no_more_layers(fresh, tuner, tmp_path, name):
    settings = {"train_type": name, "freeze_vit": True, "freeze_aligner": True}
    prepare_model(fresh(), tuner(**settings, target_modules=["q_proj"])).save_pretrained(tmp_path)
    more = tuner(**settings, target_modules=["q_proj", "up_proj"], resume_from_checkpoint=str(tmp_path))
    with pytest.raises(RecipeError, match=r"whose layers share weights, but this recipe adds .*up_proj\."):
        prepare_model(fresh(), more)


def test_lora_dtype_holds_in_a_second_stage(fresh, tuner, tmp_path):
    prepare_model(fresh(), tuner(**ALIGNER, lora_dtype="bfloat16")).save_pretrained(tmp_path)
    model = prepare_model(fresh(), tuner(**WIDER, lora_dtype="bfloat16", resume_from_checkpoint=str(tmp_path)))
    assert {value.dtype for name, value in model.named_parameters() if ".lora_" in name} == {torch.bfloat16}


def test_each_layer_keeps_the_rank_and_scale_of_its_stage(staged):
    _, _, model = staged(FIRST["rslora with patterns"], SECOND["rslora with patterns"])
    found = {
        (module.r["default"], module.lora_alpha["default"], name.endswith("linear_fc1"), ".visual." in name)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "r")
    }
    assert found == {(4, 8, False, True), (3, 8, True, True), (2, 32, False, False)}


@pytest.mark.parametrize("name", ["lora", "full mergers"])
def test_what_came_along_into_a_frozen_part_stays_bit_for_bit(staged, train, tmp_path, name):
    frozen = SECOND[name] | {"freeze_aligner": True}
    folder, _, model = staged(FIRST[name], frozen)
    before = values(model)
    train(model)
    after = values(model)
    own = [key for key in before if ".visual." in key and (".lora_" in key or ".modules_to_save." in key)]
    assert own
    assert all(torch.equal(before[key], after[key]) for key in own)
    assert any(not torch.equal(before[key], after[key]) for key in before), "vacuous: nothing trains"
    model.save_pretrained(tmp_path / "stage_2")
    then, now = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "stage_2"))
    assert all(torch.equal(then[key], now[key]) for key in then)
    assert len(now) > len(then)


def test_what_travels_frozen_has_no_dropout(fresh, tuner, tmp_path):
    prepare_model(fresh(), tuner(**ALIGNER)).save_pretrained(tmp_path)
    settings = WIDER | {"freeze_aligner": True, "lora_dropout": 0.5, "resume_from_checkpoint": str(tmp_path)}
    found = {
        (".visual." in name, type(module.lora_dropout["default"]).__name__)
        for name, module in prepare_model(fresh(), tuner(**settings)).named_modules()
        if hasattr(module, "lora_dropout")
    }
    assert found == {(True, "Identity"), (False, "Dropout")}


def test_modules_named_again_train_in_a_frozen_part(staged):
    second = WIDER | {"freeze_aligner": True, "modules_to_save": MERGERS[:1]}
    _, _, model = staged(FIRST["full mergers"], second)
    copies = {name: value.requires_grad for name, value in model.named_parameters() if ".modules_to_save." in name}
    assert {name for name, trains in copies.items() if trains} == {name for name in copies if ".visual.merger." in name}
    assert not all(copies.values())


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS[1:])])
@pytest.mark.parametrize("name", AGAIN)
def test_every_adapter_can_be_gone_on_with(staged, train, logits, fresh, tmp_path, name, kind):
    from qwenvl_ft.model.load import load_model

    settings = {"train_type": name, **AGAIN[name]}
    _, first, model = staged(settings, settings, kind)
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(fresh(kind)), first, atol=1e-4), "vacuous: the first stage changes nothing"
    trained = logits(train(model))
    assert not torch.allclose(trained, first, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", torch_dtype="float32", attn_impl="sdpa")
    torch.testing.assert_close(logits(again), trained, rtol=1e-5, atol=1e-5)


def test_experts_of_the_first_stage_come_along(staged, logits, train, fresh, tmp_path):
    first = {"freeze_vit": True, "freeze_aligner": True, "lora_rank": 2, "target_modules": ["q_proj"]}
    first["target_parameters"] = ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    second = {"freeze_vit": True, "lora_rank": 4, "target_modules": ["v_proj"], "target_parameters": []}
    _, expected, model = staged(first, second, "moe")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    trained = logits(train(model))
    model.save_pretrained(tmp_path / "stage_2")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(fresh("moe"), tmp_path / "stage_2")), trained, rtol=1e-5, atol=1e-5
    )
    written = json.loads((tmp_path / "stage_2" / "adapter_config.json").read_text())
    assert len(written["target_parameters"]) == 2
    assert {name.rpartition(".")[2] for name in written["target_modules"]} == {"q_proj", "v_proj"}


def test_an_adapter_made_by_peft_alone_is_gone_on_with(fresh, tuner, train, logits, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["visual.merger"])
    model = train(get_peft_model(fresh(), config))
    model.save_pretrained(tmp_path)
    again = prepare_model(fresh(), tuner(**WIDER, resume_from_checkpoint=str(tmp_path)))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_two_adapters_that_cannot_be_one_are_refused(fresh, tuner, tmp_path):
    def refused(error, match, kind="dense", **changes):
        with pytest.raises(error, match=match):
            prepare_model(fresh(kind), tuner(**(WIDER | changes), resume_from_checkpoint=str(tmp_path / "a")))

    prepare_model(fresh(), tuner(**ALIGNER)).save_pretrained(tmp_path / "a")
    refused(RecipeError, "of type LORA, but this recipe trains one of type VERA", train_type="vera")
    refused(RecipeError, "trained with use_dora=False, but this recipe sets True", use_dora=True)
    refused(RecipeError, "merger.* in full, but .* has an adapter for it", modules_to_save=MERGERS)
    shutil.rmtree(tmp_path / "a")
    prepare_model(fresh(), tuner(**FIRST["one full merger"])).save_pretrained(tmp_path / "a")
    refused(RecipeError, "Name the same modules", modules_to_save=["model.visual.merger.linear_fc1"])
    prepare_model(fresh(), tuner(lora_rank=2, target_modules=["up_proj"])).save_pretrained(tmp_path / "a")
    refused(CheckpointError, "has no place for .*up_proj", kind="moe")


def test_an_error_says_what_a_folder_without_an_adapter_is(tiny_dir, tmp_path, fresh, tuner):
    def refused(folder, match):
        with pytest.raises(CheckpointError, match=match):
            prepare_model(fresh(), tuner(resume_from_checkpoint=str(folder)))

    refused(tmp_path / "none", "none does not exist")
    refused(tiny_dir, "is a whole model. Set model.model=")
    prepare_model(fresh(), tuner(**ALIGNER)).save_pretrained(tmp_path / "checkpoint-8")
    refused(tmp_path, "holds no adapter. Did you mean .*checkpoint-8")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("tuner.train_type=full", "train_type=full has none. Merge it first"),
        ("tuner.init_weights=pissa", "Remove tuner.init_weights"),
    ],
)
def test_recipes_that_cannot_go_on_are_refused_before_anything_is_loaded(given, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(None, ["tuner.resume_from_checkpoint=output/stage_1", given])
