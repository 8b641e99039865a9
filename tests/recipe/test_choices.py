"""The choices of a key come from the table that it selects from, or equal it, and reading them is fast."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.evaluation.metrics import METRICS
from qwenvl_ft.recipe.choices import OneOf
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.methods import METHODS
from qwenvl_ft.recipe.reference import type_name
from qwenvl_ft.recipe.schema import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def table_of(key):
    section, _, name = key.partition(".")
    _, choices = get_args(own_types(section)[name])
    assert isinstance(choices, OneOf)
    return choices.names()


def literals(key):
    section, _, name = key.partition(".")
    kind = own_types(section)[name]
    return set(get_args(get_args(kind)[0]) if name == "quantized_parts" else get_args(kind))


@pytest.mark.parametrize(("key", "table"), [("tuner.train_type", METHODS), ("evaluation.metric", METRICS)])
def test_choices_that_can_be_added_come_from_their_table(key, table, monkeypatch):
    section, _, name = key.partition(".")
    assert table_of(key) == list(table)
    assert type_name(own_types(section)[name]) == ", ".join(table)
    with pytest.raises(RecipeError, match=rf"override: {key}: 'mine' is not one of the choices\. Known: "):
        load_recipe(None, [f"{key}=mine"])
    monkeypatch.setitem(table, "mine", next(iter(table.values())))
    asking = ["evaluation.run_after_training=true", "data.val=v.jsonl"]  # else no run reads the metric
    assert getattr(getattr(load_recipe(None, [*asking, f"{key}=mine"]), section), name) == "mine"


def test_exactly_two_keys_take_their_choices_from_a_table():
    kinds = {f"{section}.{name}": kind for section in SECTIONS for name, kind in own_types(section).items()}
    from_tables = {key for key, kind in kinds.items() if any(isinstance(part, OneOf) for part in get_args(kind))}
    assert from_tables == {"tuner.train_type", "evaluation.metric"}


def test_choices_that_repeat_a_table_equal_it():
    """These tables are in modules above the recipe, so adding to one takes a change of the schema too."""
    from qwenvl_ft.data.dense.options import SCALES
    from qwenvl_ft.data.dense.prompts import SCHEMES
    from qwenvl_ft.model.adapters.interventions import INTERVENTIONS
    from qwenvl_ft.model.anatomy import FAMILIES, PARTS
    from qwenvl_ft.model.choose_attention import ATTENTION_NAMES

    assert literals("model.attn_impl") == set(ATTENTION_NAMES)
    assert literals("quantization.quantized_parts") == set(PARTS)
    assert literals("data.emit_norm") == set(SCALES)
    assert {scheme.upper() for scheme in literals("prompts.scheme")} == set(SCHEMES)
    assert literals("tuner.reft_intervention_type") == set(INTERVENTIONS)
    assert literals("template.template") == {*FAMILIES, "qwen"}


def test_reading_a_choice_imports_neither_torch_nor_peft():
    code = (
        "import sys; from qwenvl_ft.recipe.load import load_recipe; "
        "load_recipe(None, ['tuner.train_type=boft', 'evaluation.metric=exact_match', 'tuner.boft_block_size=8']); "
        "print('qwenvl_ft.evaluation.metrics' in sys.modules, 'torch' in sys.modules, 'peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "False", "False"]
