"""Every trainable parameter is in one group with its part's rate, and every group ends at the same floor."""

from functools import partial

import pytest
import torch
from cases import MOST_KINDS
from torch import nn
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SchedulerType

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.anatomy import PARTS, part_of
from qwenvl_ft.recipe.schema import MIN_LR_SCHEDULES
from qwenvl_ft.tuning.optimizer import logged_rates, param_groups, schedule_with_floor
from qwenvl_ft.tuning.prepare import prepare_model

RATES = {"vision": 8e-5, "merger": 3e-4, "llm": 1e-4}
GIVEN = {"learning_rate": RATES["llm"], "vit_lr": RATES["vision"], "aligner_lr": RATES["merger"], "weight_decay": 0.1}
FLOORED = "cosine_warmup_with_min_lr"
ALIGNER_ONLY = {
    "target_regex": "^$",
    "modules_to_save": ["model.visual.merger", "model.visual.deepstack_merger_list"],
    "freeze_llm": True,
    "freeze_vit": True,
    "freeze_aligner": True,
}


def contents(model, groups):
    """Return parameter name -> its group, after checking that each is in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(placed) == len(dict(placed)), "a parameter is in two groups"
    return dict(placed)


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize(
    "settings",
    [{"train_type": "full"}, {}, {"use_dora": True}, {"modules_to_save": ["merger"]}, ALIGNER_ONLY],
    ids=["full", "lora", "dora", "mixed", "aligner"],
)
def test_every_trained_parameter_is_in_the_group_of_its_part(fresh, tuner, kind, settings):
    if settings is ALIGNER_ONLY and kind.startswith("qwen3_5"):
        settings = ALIGNER_ONLY | {"modules_to_save": ["model.visual.merger"]}
    model = prepare_model(fresh(kind), tuner(**settings))
    groups = param_groups(model, **GIVEN)
    placed = contents(model, groups)
    assert placed.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    for name, group in placed.items():
        part, kind = group["name"].split("/")
        assert part == part_of(name)
        assert group["lr"] == RATES[part]
        assert group["weight_decay"] == {"decay": 0.1, "no_decay": 0.0}[kind]
    assert all(group["params"] for group in groups), "an empty group"


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_what_decays_is_what_decays_in_transformers(fresh, kind):
    """Trainer's own rule: all parameters except biases and normalisation layers."""
    model = fresh(kind)
    norms = [module for module in {type(m) for m in model.modules()} if "Norm" in module.__name__]
    gated = kind.startswith("qwen3_5")
    assert len(norms) == 2 + gated, "LayerNorm in the vision tower, RMSNorm in the language model and in delta nets"
    reference = set(get_parameter_names(model, norms, ["bias"]))
    placed = contents(model, param_groups(model, **GIVEN))
    decays = {name for name, group in placed.items() if group["name"].endswith("/decay")}
    assert decays == reference & placed.keys()
    for name in ("model.visual.blocks.0.norm1.weight", "model.language_model.layers.3.self_attn.q_norm.weight"):
        assert placed[name]["name"].endswith("/no_decay")


def test_lora_matrices_decay_and_dora_magnitudes_do_not(fresh, tuner):
    model = prepare_model(fresh(), tuner(use_dora=True))
    kinds = {}
    for name, group in contents(model, param_groups(model, **GIVEN)).items():
        kinds.setdefault(name.split(".lora_")[1].split(".")[0], set()).add(group["name"].split("/")[1])
    assert kinds == {"A": {"decay"}, "B": {"decay"}, "magnitude_vector": {"no_decay"}}


def test_the_aligners_rate_is_the_only_one_when_only_full_copies_train(fresh, tuner):
    model = prepare_model(fresh(), tuner(**ALIGNER_ONLY))
    groups = param_groups(model, learning_rate=5e-4, vit_lr=5e-4, aligner_lr=1e-4, weight_decay=0.2)
    assert [(group["name"], group["lr"]) for group in groups] == [("merger/decay", 1e-4), ("merger/no_decay", 1e-4)]
    assert all(".modules_to_save." in name for name in contents(model, groups))


def test_rates_that_are_not_given_are_the_learning_rate(fresh):
    assert {group["lr"] for group in param_groups(fresh(), learning_rate=7e-5)} == {7e-5}


def test_wrapped_models_have_the_same_groups(fresh, tuner):
    model = prepare_model(fresh(), tuner(modules_to_save=["merger"]))
    bare = [(group["name"], [id(p) for p in group["params"]]) for group in param_groups(model, **GIVEN)]
    for wrapped in (nn.ModuleDict({"module": model}), torch.compile(model)):
        assert [(g["name"], [id(p) for p in g["params"]]) for g in param_groups(wrapped, **GIVEN)] == bare


def test_one_step_moves_each_part_by_its_own_rate(fresh):
    model = fresh()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, learning_rate=0.5, vit_lr=0.25, aligner_lr=0.125))
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    step = {"vision": 0.25, "merger": 0.125, "llm": 0.5}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name] - step[part_of(name)])


def test_nothing_to_train_and_foreign_parameters_are_errors(fresh):
    model = fresh().requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing is left to train"):
        param_groups(model, **GIVEN)
    model.stranger = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"'stranger\.weight' belongs to none"):
        param_groups(model, **GIVEN)


def optimizer_with(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=rates[0])


def course(optimizer, scheduler, steps):
    """Return the rates of all groups at each step: ``[step][group]``."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 20), (100, 1000), (5, 5)])
def test_one_group_follows_the_schedule_of_transformers(warmup, total):
    ours, theirs = optimizer_with(1e-4), optimizer_with(1e-4)
    expected = course(
        theirs,
        get_scheduler("cosine_warmup_with_min_lr", theirs, warmup, total, scheduler_specific_kwargs={"min_lr": 1e-6}),
        total,
    )
    found = course(ours, schedule_with_floor(FLOORED, ours, warmup_steps=warmup, total_steps=total, min_lr=1e-6), total)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


def test_every_group_ends_at_the_same_floor():
    rates = (1e-4, 8e-5, 5e-4)
    ours, theirs = optimizer_with(*rates), optimizer_with(*rates)
    schedule = schedule_with_floor(FLOORED, ours, warmup_steps=10, total_steps=100, min_lr=1e-6)
    last = course(ours, schedule, 100)
    assert last[9] == pytest.approx(rates)
    assert last[99] == pytest.approx([1e-6] * 3)
    options = {"min_lr": 1e-6}
    upstream = get_scheduler("cosine_warmup_with_min_lr", theirs, 10, 100, scheduler_specific_kwargs=options)
    assert course(theirs, upstream, 100)[99] != pytest.approx([1e-6] * 3), "vacuous: upstream's floors agree too"


def test_the_floor_holds_beyond_the_last_step():
    optimizer = optimizer_with(1e-4)
    schedule = schedule_with_floor(FLOORED, optimizer, warmup_steps=0, total_steps=10, min_lr=1e-6)
    assert course(optimizer, schedule, 30)[10:] == [[pytest.approx(1e-6)]] * 20


def test_a_group_below_the_floor_keeps_its_rate():
    optimizer = optimizer_with(1e-7, 0.0)
    schedule = schedule_with_floor(FLOORED, optimizer, warmup_steps=2, total_steps=10, min_lr=1e-6)
    assert course(optimizer, schedule, 10)[1:] == [[pytest.approx(1e-7), 0.0]] * 9


def test_a_resumed_schedule_goes_on_where_it_was():
    make = partial(schedule_with_floor, FLOORED, warmup_steps=3, total_steps=20, min_lr=1e-6)
    whole = optimizer_with(1e-4, 3e-5)
    expected = course(whole, make(whole), 20)
    first = optimizer_with(1e-4, 3e-5)
    schedule = make(first)
    course(first, schedule, 8)
    second = optimizer_with(1e-4, 3e-5)
    resumed = make(second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert course(second, resumed, 12) == expected[8:]


def test_parts_come_in_a_fixed_order(fresh):
    names = [group["name"] for group in param_groups(fresh(), **GIVEN)]
    assert names == [f"{part}/{kind}" for part in PARTS for kind in ("decay", "no_decay")]


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_lora_plus_is_peft_s(fresh, tuner, kind):
    """If all parts have one rate, every parameter's rate is that of peft's own LoRA+ optimizer."""
    from peft.optimizers import create_loraplus_optimizer

    model = prepare_model(fresh(kind), tuner())  # without full copies, whose biases peft counts as B
    theirs = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-4, loraplus_lr_ratio=16.0)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    groups = param_groups(model, learning_rate=1e-4, weight_decay=0.1, lora_plus=16.0)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert found == pytest.approx(expected)
    assert set(expected.values()) == {1e-4, 16e-4}, "vacuous: one rate"


def test_lora_plus_multiplies_each_part_s_own_rate(fresh, tuner):
    model = prepare_model(fresh(), tuner(use_dora=True))
    groups = param_groups(model, **GIVEN, lora_plus=8.0)
    for name, group in contents(model, groups).items():
        part = part_of(name)
        assert group["lr"] == pytest.approx(RATES[part] * (8 if ".lora_B." in name else 1))
        kind = "lora_B" if ".lora_B." in name else "no_decay" if "magnitude" in name else "decay"
        assert group["name"] == f"{part}/{kind}"
        assert group["weight_decay"] == (0.0 if "magnitude" in name else 0.1)
    rates = logged_rates(torch.optim.SGD(groups))
    assert rates == pytest.approx(RATES | {f"{part}/lora_B": 8 * rate for part, rate in RATES.items()})


def test_lora_plus_without_lora_is_an_error(fresh):
    with pytest.raises(
        RecipeError, match=r"lorap_lr_ratio applies to LoRA's B matrices, but the model has no trainable"
    ):
        param_groups(fresh(), learning_rate=1e-4, lora_plus=16.0)


OPTIONS = {
    "polynomial": {"lr_end": 0.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "warmup_stable_decay": {"num_decay_steps": 5},
}
GIVEN_BY_METRICS = ("reduce_lr_on_plateau", "greedy")
"""These schedules follow a metric, not the step."""


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType if kind.value not in GIVEN_BY_METRICS])
def test_under_every_schedule_each_group_keeps_its_share(kind):
    """All groups rise and fall together, each from its own rate; those with a floor end at the same one."""
    rates, floor = (1e-4, 8e-5, 5e-4), 1e-6
    optimizer = optimizer_with(*rates)
    if kind in MIN_LR_SCHEDULES:
        schedule = schedule_with_floor(kind, optimizer, warmup_steps=4, total_steps=20, min_lr=floor)
    else:
        options = OPTIONS[kind] if kind in OPTIONS else {}
        schedule = get_scheduler(kind, optimizer, 4, 20, scheduler_specific_kwargs=options)
    for step, found in enumerate(course(optimizer, schedule, 20)):
        if kind in MIN_LR_SCHEDULES and step >= 4:
            shares = [(rate - floor) / (peak - floor) for rate, peak in zip(found, rates, strict=True)]
        else:
            shares = [rate / peak for rate, peak in zip(found, rates, strict=True)]
        assert shares == pytest.approx([shares[0]] * 3, abs=1e-9), step
    assert {shares[0] < 0.9} == {"constant" not in kind}


@pytest.mark.parametrize("kind", ["cosine_with_min_lr", "cosine_warmup_with_min_lr"])
@pytest.mark.parametrize("options", [{}, {"num_cycles": 1.5}])
def test_options_of_a_schedule_with_a_floor_reach_it(kind, options):
    ours, theirs = optimizer_with(1e-4), optimizer_with(1e-4)
    settings = {"min_lr": 1e-6} | options
    expected = course(theirs, get_scheduler(kind, theirs, 3, 20, scheduler_specific_kwargs=settings), 20)
    found = course(ours, schedule_with_floor(kind, ours, warmup_steps=3, total_steps=20, **settings), 20)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=0)
