"""A prepared model trains what the recipe names and saves it with peft; a wrongly prepared model is an error."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from qwenvl_ft.assemble import keep_float32
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import canonical_name, part_of
from qwenvl_ft.tuning.prepare import check_prepared, prepare_model, trainable_table

MERGERS = ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{n}" for n in range(3))]
ALL_FROZEN = {"freeze_llm": True, "freeze_vit": True, "freeze_aligner": True}

RECIPES = {
    "all linear": {},
    "aligner in full, no adapter": {"target_regex": "^$", "modules_to_save": MERGERS, **ALL_FROZEN},
    "aligner in full, llm adapted": {"modules_to_save": MERGERS, "freeze_vit": True, "freeze_aligner": True},
    "a list's elements": {"modules_to_save": ["visual.deepstack_merger_list"], "freeze_llm": True},
    "rslora": {"use_rslora": True, "freeze_vit": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "linear_fc1"]},
    "bias": {"lora_bias": "all", "freeze_vit": True},
}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("name", RECIPES)
def test_trained_adapter_saves_loads_and_merges_to_the_same_logits(fresh, tuner, train, logits, tmp_path, kind, name):
    base = logits(fresh(kind))
    model = prepare_model(fresh(kind), tuner(**RECIPES[name]))
    torch.testing.assert_close(logits(model), base, msg="preparing alone must change nothing")
    trained = logits(train(model))
    assert not torch.allclose(trained, base, atol=1e-2), "vacuous: nothing was learnt"
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(fresh(kind), tmp_path)
    torch.testing.assert_close(logits(again), trained)
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


def test_biases_of_norms_train_in_float32_beside_bfloat16_weights(fresh, tuner, batch):
    """On a CPU a LayerNorm with two dtypes is an error; converting its weight as well changes no value."""
    model = prepare_model(fresh(torch_dtype="bfloat16"), tuner(lora_bias="all"))
    before = {name: (value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()}
    inputs = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        biases = [value for value in model.parameters() if value.requires_grad]
        for value in biases:
            value.data = value.data.float()
        with pytest.raises(RuntimeError, match="scalar type"):
            model(**inputs)
        keep_float32(model)
        assert bool(model(**inputs).logits.isfinite().all())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0].to(value.dtype)), name
        assert value.requires_grad == before[name][1]
        assert value.dtype == torch.float32 or not value.requires_grad, name
    norm = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    assert {value.dtype for value in norm.parameters()} == {torch.float32}


def test_the_only_trained_weights_are_the_named_modules(fresh, tuner):
    model = prepare_model(fresh(), tuner(**RECIPES["aligner in full, no adapter"]))
    assert isinstance(model, PeftModel)
    trained = {canonical_name(name) for name, value in model.named_parameters() if value.requires_grad}
    expected = {name for name, _ in fresh().named_parameters() if part_of(name) == "merger"}
    assert trained == expected
    assert sum(isinstance(module, ModulesToSaveWrapper) for module in model.modules()) == 4


def test_full_copies_and_adapters_share_one_run(fresh, tuner):
    model = prepare_model(fresh(), tuner(**RECIPES["aligner in full, llm adapted"]))
    kinds = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            kinds.setdefault(part_of(name), set()).add("lora" if ".lora_" in name else "full")
    assert kinds == {"merger": {"full"}, "llm": {"lora"}}


def test_adapter_config_names_base_and_settings(fresh, tuner, tmp_path, tiny_dir):
    settings = tuner(lora_rank=4, lora_alpha=12, lora_dropout=0.1, use_rslora=True, freeze_vit=True)
    prepare_model(fresh(), settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 12, 0.1)
    assert written["use_rslora"] is True
    assert written["base_model_name_or_path"] == str(tiny_dir)


def test_full_training_reaches_named_modules_in_frozen_parts(fresh, tuner):
    model = prepare_model(
        fresh(), tuner(train_type="full", modules_to_save=["visual.deepstack_merger_list"], **ALL_FROZEN)
    )
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith("model.visual.deepstack_merger_list.") for name in trained)


def test_whole_towers_can_be_saved_beside_an_adapter(fresh, tuner, train, logits):
    model = prepare_model(fresh(), tuner(modules_to_save=["model.visual"], freeze_llm=False))
    before = logits(model)
    assert not torch.allclose(logits(train(model)), before)
    assert {part_of(name) for name, value in model.named_parameters() if value.requires_grad} == {
        "vision",
        "merger",
        "llm",
    }


def test_a_layer_that_shares_its_weight_is_not_copied(fresh, tuner):
    for name in ("lm_head", "embed_tokens", "model.language_model"):
        with pytest.raises(RecipeError, match="shares between embedding and language head"):
            prepare_model(fresh(), tuner(modules_to_save=[name]))
    model = prepare_model(fresh("moe"), tuner(modules_to_save=["lm_head"], **ALL_FROZEN))
    trained = [canonical_name(name) for name, value in model.named_parameters() if value.requires_grad]
    assert trained == ["lm_head.weight"]


def test_dora_without_a_target_is_said(fresh, tuner, caplog):
    with caplog.at_level(logging.WARNING):
        prepare_model(fresh(), tuner(use_dora=True, **RECIPES["aligner in full, no adapter"]))
    assert "use_dora has no effect" in caplog.text


def test_checkpointed_activations_give_every_adapter_the_same_gradient(fresh, tuner, loss):
    """The embedding is frozen, so reentrant checkpointing would give no gradients."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare_model(fresh(), tuner()).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_activation_checkpointing
        for name, value in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        loss(model).backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert {part_of(name) for name in grads[0]} == {"vision", "merger", "llm"}
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_type": "lorra"}, r"unknown tuner\.train_type 'lorra'\. Did you mean 'lora'\? Known: "),
        (ALL_FROZEN, r"leaves nothing to train.*frozen: vision, merger, llm.*tuner\.freeze_llm=false"),
        ({"train_type": "full", **ALL_FROZEN}, r"nothing is left to train.*tuner\.freeze_vit=false"),
        ({"target_regex": "^$"}, r"leaves nothing to train.*no tuner\.modules_to_save"),
        ({"train_type": "full", "modules_to_save": ["nothing"]}, r"'nothing', which is not a module"),
    ],
)
def test_a_recipe_that_trains_nothing_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), tuner(**settings))
    assert "\n" not in str(caught.value)


def test_preparing_twice_is_refused(fresh, tuner):
    model = prepare_model(fresh(), tuner())
    with pytest.raises(RecipeError, match=r"has an adapter already.*model\.model"):
        prepare_model(model, tuner())


def test_an_unprepared_model_is_refused(fresh, tuner):
    with pytest.raises(RecipeError, match=r"no adapter and all of it would train.*prepare_model"):
        check_prepared(fresh(), tuner())
    with pytest.raises(RecipeError, match=r"tuner\.freeze_vit=true, but model\.visual.*would train"):
        check_prepared(fresh(), tuner(train_type="full", freeze_vit=True))
    loosened = prepare_model(fresh(), tuner())
    loosened.get_base_model().model.language_model.norm.weight.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"1 weights of the base model would train too.*norm\.weight"):
        check_prepared(loosened, tuner())
    check_prepared(fresh(), tuner(train_type="full"))


def columns(table):
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}


def test_the_table_counts_what_trains(fresh, tuner):
    rates = {"vision": 8e-5, "merger": 1e-4, "llm": 2e-5}
    bare = fresh()
    sizes = dict.fromkeys(rates, 0)
    for name, value in bare.named_parameters():
        sizes[part_of(name)] += value.numel()
    rank = 2
    lora = dict.fromkeys(rates, 0)
    for name, module in bare.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            lora[part_of(name)] += rank * (module.in_features + module.out_features)
    settings = tuner(lora_rank=rank, modules_to_save=MERGERS, freeze_vit=True)
    table = trainable_table(prepare_model(fresh(), settings), rates)
    found = columns(table)
    assert found["vision"] == [f"{sizes['vision']:,}", "0", "0", "frozen"]
    assert found["merger"] == [f"{sizes['merger']:,}", f"{sizes['merger']:,}", "0", "0.0001"]
    assert found["llm"] == [f"{sizes['llm']:,}", f"{lora['llm']:,}", f"{lora['llm']:,}", "2e-05"]
    total = sum(sizes.values())
    assert found["total"][0] == f"{total:,}"
    assert found["total"][1] == f"{sizes['merger'] + lora['llm']:,}"
    full = columns(trainable_table(prepare_model(fresh(), tuner(train_type="full")), rates))
    assert full["total"][:3] == [f"{total:,}", f"{total:,}", "0"]


def test_the_table_says_that_an_adapter_does_not_reach_experts(fresh, tuner):
    rates = {"vision": 1e-4, "merger": 1e-4, "llm": 1e-4}
    model = fresh("moe")
    experts = sum(v.numel() for n, v in model.named_parameters() if "experts" in n or n.endswith("mlp.gate.weight"))
    assert experts > 0
    assert f"not reached by LoRA: experts and routers (not Linear layers), {experts:,} parameters" in trainable_table(
        prepare_model(model, tuner(target_parameters=[])), rates
    )
    routers = sum(v.numel() for n, v in fresh("moe").named_parameters() if n.endswith("mlp.gate.weight"))
    assert f"{routers:,} parameters" in trainable_table(prepare_model(fresh("moe"), tuner()), rates)
    assert "not reached" not in trainable_table(prepare_model(fresh("moe"), tuner(train_type="full")), rates)
    assert "not reached" not in trainable_table(prepare_model(fresh(), tuner()), rates)
