"""A setting that a run does not read is an error if its user gave it, and falls away if it was meant for other runs."""

import pytest
import torch
import yaml
from recipe_cases import sample
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.evaluation.metrics import METRICS
from qwenvl_ft.recipe.keys import own_types, type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.read_if import READ_IF, WITHOUT_ADAM_KEYS, WITHOUT_EPSILON, WITHOUT_WARMUP
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS
from qwenvl_ft.recipe.unread import default_of, value_in

UNREAD = {
    "training.eval_strategy": ["training.eval_strategy=no", "data.val=v.jsonl"],
    "training.save_strategy": ["training.save_strategy=no"],
    "training.logging_strategy": ["training.logging_strategy=epoch"],
    "training.lr_scheduler_type": ["training.lr_scheduler_type=constant"],
    "training.optim": ["training.optim=sgd"],
    "training.activation_checkpointing": ["training.activation_checkpointing=false"],
    "training.dataloader_num_workers": ["training.dataloader_num_workers=0"],
    "training.report_to": ["training.report_to=none"],
    "data.on_error": ["data.on_error=raise"],
}
"""Deciding key -> settings with which its keys are not read, if the defaults are not such."""
VALUES = {
    "training.lr_scheduler_kwargs": {"min_lr": 1e-6},
    "training.metric_for_best_model": "eval_loss",
    "training.greater_is_better": False,
    "training.fsdp_config": {"version": 2},
    "training.liger_kernel_config": {"rope": True},
    "training.activation_checkpointing_kwargs": {"use_reentrant": False},
    "training.save_total_limit": 3,
    "tuner.target_modules": ["q_proj"],
    "tuner.init_weights": "gaussian",
    "tuner.reft_layers": [1],
    "quantization.quantized_parts": ["vision"],
    "data.train_dataset_mix_ds": "other.jsonl",
}
"""Key -> a valid value other than the default, if one of its type is not valid."""
ONE_VALUE = {"evaluation.metric"} if len(METRICS) == 1 else set()
CASES = [(entry, key) for entry in READ_IF for key in entry.keys if key not in ONE_VALUE]


def name_of(value):
    return value if isinstance(value, str) else value.by[0]


def value_for(key):
    section, _, name = key.partition(".")
    default = getattr(SECTIONS[section](), name) if name in own_types(section) else HF_DEFAULTS.get(name)
    return VALUES[key] if key in VALUES else sample(type_of(key), default)


def deciding(entry, key):
    """Return overrides with which a key is not read."""
    if entry.by[0] == "tuner.train_type":
        lacking = next(kind for kind in ("full", "lora", "reft") if not entry.when(load_recipe(None, [method(kind)])))
        return [method(lacking)]
    return UNREAD.get(entry.by[0], [])


def method(kind):
    return f"tuner.train_type={kind}"


def word(key, value):
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}"


def text(key, value):
    section, _, name = key.partition(".")
    return yaml.safe_dump({section: {name: value}})


@pytest.mark.parametrize(("entry", "key"), CASES, ids=name_of)
def test_a_given_key_that_is_not_read_is_an_error_that_names_it_and_its_condition(entry, key, write):
    value, decisive = value_for(key), deciding(entry, key)
    assert value != default_of(key), "vacuous: the default is no setting"
    expected = rf"{key}.* is not read with .*\. Remove {key}, or "
    with pytest.raises(RecipeError, match=rf"^override: {expected}"):
        load_recipe(None, [*decisive, word(key, value)])
    if not decisive:
        with pytest.raises(RecipeError, match=rf"^{write('mine.yaml', text(key, value))}: {expected}"):
            load_recipe(write("mine.yaml", text(key, value)))


SOME = [case if place % 4 == 0 else pytest.param(*case, marks=pytest.mark.soak) for place, case in enumerate(CASES)]
"""``CASES``, of which every fourth is tried outside of ``make soak``."""


@pytest.mark.parametrize(("entry", "key"), SOME, ids=name_of)
def test_a_key_of_a_base_or_below_a_stronger_decision_falls_away(entry, key, write):
    value, decisive = value_for(key), deciding(entry, key)
    file = write("weak.yaml", text(key, value))
    top = write("top.yaml", "extends: weak.yaml")
    recipes = [load_recipe(top, decisive)]
    if decisive and decisive[0].startswith(entry.by):
        recipes.append(load_recipe(file, decisive))
    for recipe in recipes:
        assert value_in(recipe, key) == default_of(key)
        assert recipe.origin(key) == "default"
        recipe.save(write("saved.yaml", ""))
        assert load_recipe(write("saved.yaml", recipe.to_yaml())) == recipe


def test_settings_that_a_run_leaves_unread_are_errors():
    for words, key in (
        (
            "training.lr_scheduler_type=constant training.warmup_ratio=0.3",
            "training.warmup_ratio (training.warmup_steps=0.3)",
        ),
        ("data.val_dataset_sample=5", "data.val_dataset_sample=5"),
        ("training.eval_steps=5", "training.eval_steps=5"),
        ("training.eval_steps=5 data.val=v training.eval_strategy=epoch", "training.eval_steps=5"),
        ("training.logging_dir=logs training.report_to=none", "training.logging_dir='logs'"),
        ("training.adam_beta2=0.95 training.optim=adafactor", "training.adam_beta2=0.95"),
        ("tuner.lora_rank=4 tuner.train_type=full", "tuner.lora_rank=4"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(None, words.split())
        assert str(caught.value).startswith(f"override: {key} is not read with ")


def test_a_key_that_some_phases_read_is_no_error_and_one_that_none_reads_is(write):
    phases = "phases: [{name: a, data: {train: a.jsonl}}, {name: b, data: {train: b.jsonl, val: v.jsonl}}]"
    recipe = load_recipe(write("a.yaml", f"training: {{eval_steps: 7}}\n{phases}"))
    evaluations = [phase.training.arguments.get("eval_steps") for phase in recipe.phases]
    assert evaluations == [None, 7]
    with pytest.raises(RecipeError, match=r"training\.warmup_steps=0\.3 is not read"):
        load_recipe(write("b.yaml", f"training: {{warmup_steps: 0.3, lr_scheduler_type: constant}}\n{phases}"))
    mine = phases.replace("{train: a.jsonl}", "{train: a.jsonl}, training: {eval_steps: 3}")
    with pytest.raises(RecipeError, match=r"phase 1/2 a: .*training\.eval_steps=3 is not read with data\.val=null"):
        load_recipe(write("c.yaml", mine))


@pytest.fixture
def arguments(tmp_path):
    def build(**settings):
        return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)

    return build


OPTIMS = [str(name.value) for name in OptimizerNames]
OTHER = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 0.25}


@pytest.mark.parametrize("key", OTHER)
def test_transformers_passes_adam_s_keys_to_just_the_optimizers_of_the_table(key, arguments):
    """Asked by a second value of the key: does it change the optimizer's arguments?"""
    tried = 0
    for optim in OPTIMS:
        if optim.endswith("layerwise") or optim in ("lomo", "adalomo", "grokadamw"):
            continue  # `checks.optimizer.unsuitable` refuses them
        needs = {"optim_target_modules": ["mlp"]} if optim.startswith(("galore", "apollo")) else {}
        args = arguments(optim=optim, **needs)
        model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})
        try:
            before = str(Trainer.get_optimizer_cls_and_kwargs(args, model))
        except (ImportError, ValueError, RuntimeError):
            continue  # its package is not installed
        setattr(args, key, OTHER[key])
        is_read = str(Trainer.get_optimizer_cls_and_kwargs(args, model)) != before
        unread = WITHOUT_ADAM_KEYS + (WITHOUT_EPSILON if key == "adam_epsilon" else ())
        assert is_read == (optim not in unread), optim
        tried += 1
    assert tried > 5
    assert set(WITHOUT_ADAM_KEYS + WITHOUT_EPSILON) <= set(OPTIMS)


def test_transformers_passes_the_warmup_to_all_schedules_but_those_of_the_table():
    options = {"warmup_stable_decay": {"num_decay_steps": 2}, "polynomial": {}}
    options |= {kind: {"min_lr": 1e-9} for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")}
    kinds = {str(kind.value) for kind in SchedulerType}
    for kind in kinds:
        rates = []
        for steps in (0, 5):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            schedule = get_scheduler(kind, optimizer, steps, 20, scheduler_specific_kwargs=options.get(kind))
            for _ in range(2):
                optimizer.step()
                schedule.step(*([1.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
            rates.append(optimizer.param_groups[0]["lr"])
        assert (rates[0] == rates[1]) == (kind in WITHOUT_WARMUP), kind
    assert kinds >= set(WITHOUT_WARMUP) - {"greedy"}  # greedy: transformers 5.10 and later
