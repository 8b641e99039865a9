"""After three optimizer steps, frozen parameters are bit-equal and trainable ones have changed, for every flag."""

from itertools import product

import pytest
import torch
from cases import MOST_KINDS
from run_cases import short_run, write_questions
from torch import nn

from qwenvl_ft import train
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import canonical_name
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.methods import METHODS
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model

FLAGS = ("freeze_llm", "freeze_vit", "freeze_aligner")
COMBINATIONS = list(product([False, True], repeat=3))
MERGERS = ("model.visual.merger", *(f"model.visual.deepstack_merger_list.{n}" for n in range(3)))


def every_combination(test):
    """Run a test for every kind of model, and for all eight settings of the flags."""
    names = ["+".join(flag for flag, on in zip(FLAGS, flags, strict=True) if on) or "none" for flags in COMBINATIONS]
    return pytest.mark.parametrize("kind", MOST_KINDS)(pytest.mark.parametrize("frozen", COMBINATIONS, ids=names)(test))


def flag_of(model):
    """Return module name -> the flag that freezes it, from the module tree of the bare model."""
    flags = {name: "freeze_vit" for name, _ in model.named_modules() if name.startswith("model.visual")}
    for name, _ in model.named_modules():
        if any(name == merger or name.startswith(f"{merger}.") for merger in MERGERS):
            flags[name] = "freeze_aligner"
        if name.startswith(("model.language_model", "lm_head")):
            flags[name] = "freeze_llm"
    return flags


def mergers_of(model):
    names = {name for name, _ in model.named_modules()}
    return {merger for merger in MERGERS if merger in names}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    """Return the canonical names of base parameters that are not bit-equal to ``before``."""
    after = {canonical_name(name): value for name, value in model.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


@every_combination
def test_full_training_changes_exactly_what_is_not_frozen(fresh, tuner, train, kind, frozen):
    settings = dict(zip(FLAGS, frozen, strict=True))
    model = fresh(kind)
    flags, before = flag_of(model), snapshot(model)
    expected = {name for name in before if not settings[flags[name.rpartition(".")[0]]]} if not all(frozen) else None
    if expected is None:
        with pytest.raises(RecipeError, match=r"nothing is left to train.*tuner\.freeze_llm=false"):
            prepare_model(model, tuner(train_type="full", **settings))
        return
    train(prepare_model(model, tuner(train_type="full", **settings)))
    assert changed(model, before) == expected
    moved = {merger for merger in MERGERS if changed(model, before) & {f"{merger}.norm.weight"}}
    assert moved == (set() if settings["freeze_aligner"] else mergers_of(model))


@every_combination
def test_lora_adapts_exactly_the_linear_layers_and_experts_that_are_not_frozen(fresh, tuner, train, kind, frozen):
    settings = dict(zip(FLAGS, frozen, strict=True))
    model = fresh(kind)
    flags, before, mergers = flag_of(model), snapshot(model), mergers_of(model)
    expected = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or name.endswith(".experts"))
        and name != "lm_head"
        and not settings[flags[name]]
    }
    if not expected:
        with pytest.raises(RecipeError, match=r"leaves nothing to train"):
            prepare_model(model, tuner(**settings))
        return
    model = prepare_model(model, tuner(**settings))
    adapters = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    assert {canonical_name(name).partition(".lora_")[0] for name in adapters} == expected
    assert any(name.endswith(".experts") for name in expected) == (kind.endswith("moe") and not settings["freeze_llm"])
    train(model)
    assert not changed(model, before), "a weight of the base model moved"
    named = dict(model.named_parameters())
    still = {name for name, value in adapters.items() if torch.equal(named[name], value)}
    assert not still, "an adapter did not train"
    adapted = {merger for merger in MERGERS if f"{merger}.linear_fc1" in expected}
    assert adapted == (set() if settings["freeze_aligner"] else mergers)


def test_the_comparison_sees_one_bit(fresh):
    model = fresh()
    before = snapshot(model)
    assert not changed(model, before)
    bias = model.model.visual.deepstack_merger_list[2].norm.bias
    with torch.no_grad():
        bias.view(torch.int32)[0] ^= 1
    assert changed(model, before) == {"model.visual.deepstack_merger_list.2.norm.bias"}


def test_default_flags_train_the_language_model_only(fresh):
    from qwenvl_ft.recipe.schema import TunerConfig

    model = prepare_model(fresh(), TunerConfig())
    trained = {canonical_name(name) for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith("model.language_model.layers.") for name in trained)


def test_lora_bias_all_leaves_biases_of_frozen_parts_alone(fresh, tuner, train):
    model = fresh()
    flags, before = flag_of(model), snapshot(model)
    model = train(prepare_model(model, tuner(lora_bias="all", freeze_vit=True)))
    biases = {name for name in before if name.endswith("bias")}
    assert changed(model, before) == {name for name in biases if flags[name.rpartition(".")[0]] != "freeze_vit"}
    assert any(flags[name.rpartition(".")[0]] == "freeze_vit" for name in biases), "vacuous: no such bias"


def test_lora_updates_of_bfloat16_models_are_not_rounded_away(fresh, tuner):
    model = prepare_model(fresh(torch_dtype="bfloat16"), tuner())
    dtypes = {value.requires_grad: value.dtype for value in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("key", ["unfreeze_topk_llm=1", "unfreeze_topk_vit=1", "trainable_parameters=[lm_head]"])
def test_all_parts_may_be_frozen_but_for_what_is_named(fresh, key):
    frozen = [f"tuner.freeze_{part}=true" for part in ("llm", "vit", "aligner")]
    recipe = load_recipe(None, ["tuner.train_type=full", *frozen, f"tuner.{key}"])
    model = prepare_model(fresh(), recipe.tuner)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert any(trained)
    assert not all(trained)
    with pytest.raises(RecipeError, match="nothing would train"):
        load_recipe(None, ["tuner.train_type=full", *frozen])


@pytest.mark.parametrize("name", [None, "base"])
def test_full_training_trains_all_parts_unless_a_flag_freezes_one(name, fresh):
    recipe = load_recipe(name, ["tuner.train_type=full"])
    assert [getattr(recipe.tuner, flag) for flag in FLAGS] == [False, False, False]
    assert all(value.requires_grad for value in prepare_model(fresh(), recipe.tuner).parameters())
    one = load_recipe(name, ["tuner.train_type=full", "tuner.freeze_vit=true"])
    assert [getattr(one.tuner, flag) for flag in FLAGS] == [False, True, False]


def test_every_other_method_trains_the_language_model_unless_a_flag_frees_another_part():
    for train_type in METHODS.keys() - {"full"}:
        tuner = TunerConfig(train_type=train_type)
        assert [getattr(tuner, flag) for flag in FLAGS] == [False, True, True], train_type
    assert TunerConfig(train_type="full", unfreeze_topk_vit=2).freeze_vit is True, "the last blocks of a frozen tower"
    assert TunerConfig(freeze_aligner=False).freeze_aligner is False
    assert load_recipe("base").tuner.freeze_vit is True


def test_what_full_training_leaves_frozen_is_said_before_the_first_step(tiny_dir, tmp_path):
    data = write_questions(tmp_path, 4)
    words = ("tuner.train_type=full", "training.max_steps=1", "training.save_final=false")
    for frozen in ("true", "false"):
        flags = (f"tuner.freeze_vit={frozen}", f"tuner.freeze_aligner={frozen}")
        train(load_recipe(None, short_run(tiny_dir, data, tmp_path / frozen, *words, *flags)))
        line = "full training leaves vision and merger frozen; to train all: "
        line += "tuner.freeze_vit=false, tuner.freeze_aligner=false"
        text = (tmp_path / frozen / "training.log").read_text()
        assert (line in text) is (frozen == "true")
        if frozen == "true":
            assert text.index(line) < text.index("step 1/1")
