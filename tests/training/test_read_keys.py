"""A run reads every key that the table of `recipe/read_if.py` says it reads: its reads are recorded while it trains."""

import sys

import pytest
from recipe_cases import is_read
from run_cases import run_settings, write_records
from transformers import TrainingArguments

from qwenvl_ft import train as train_function
from qwenvl_ft.recipe.keys import argument_types, own_types
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.refused import FIXED
from qwenvl_ft.recipe.schema import SECTIONS
from qwenvl_ft.upstream.arguments import RENAMED, installed_name

NOT_BY_TRAINING = ("/recipe/", "/dataclasses.py", "/copy.py", "/training_args.py", "/test_read_keys.py")
"""Files whose reads prove nothing: they load, compare, copy and save recipes and arguments."""
NAMES_OF_OTHER_TOOLS = {"template.template", "training.lazy_tokenize", "training.pack_dataset_break_mode"}
"""Keys with one meaning, whose other values are errors."""


@pytest.fixture
def reads(monkeypatch):
    """The dotted keys that are read from sections of a recipe, or from TrainingArguments, while a test runs."""
    seen = set()
    kinds = [(kind, section, set(own_types(section))) for section, kind in SECTIONS.items()]
    for kind, section, names in [*kinds, (TrainingArguments, "training", set(argument_types()))]:

        def get(self, name, section=section, names=names, original=kind.__getattribute__):
            if name in names:
                caller = sys._getframe(1)
                while any(part in caller.f_code.co_filename for part in ("/recipe/sections/", "/test_read_keys.py")):
                    caller = caller.f_back  # a property of a section reads for the one who asks it
                reader = caller.f_code.co_filename
                if not any(part in reader for part in NOT_BY_TRAINING):
                    seen.add(f"{section}.{name}")
            return original(self, name)

        monkeypatch.setattr(kind, "__getattribute__", get)
    return seen


def test_a_run_reads_all_keys_of_ours_that_have_no_condition_or_meet_it(tiny_dir, tmp_path, reads):
    data = write_records(tmp_path)
    more = ["tuner.train_type=lora", "evaluation.run_after_training=true", "evaluation.max_new_tokens=2"]
    more += ["training.max_steps=2", "data.on_error=skip", "training.early_stopping_patience=9"]
    recipe = load_recipe(None, run_settings(tiny_dir, data, tmp_path / "run", *more))
    reads.clear()
    assert train_function(recipe).steps == 2
    keys = {f"{section}.{name}" for section in SECTIONS for name in own_types(section)}
    expected = {key for key in keys if is_read(recipe, key)} - NAMES_OF_OTHER_TOOLS
    assert sorted(expected - reads) == []
    assert len(expected) > 90
    conditional = keys - {key for key in keys if is_read(recipe, key)}
    assert conditional > {"tuner.reft_rank", "deepspeed.config", "training.galore_rank"}, "vacuous: all are read"


BY_TRAINING_ARGUMENTS = {
    "ddp_backend",
    "ddp_timeout",
    "do_eval",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "save_on_each_node",
    "tf32",
    "use_cpu",
    "warmup_steps",
}
"""Fields that TrainingArguments reads itself, in its own methods."""
ACCEPTED = {"dataloader_persistent_workers", "hub_token", "prediction_loss_only", "run_name"}
"""Fields that this run does not read, and that are accepted anyway (`refused.FIXED` and `read_if.READ_IF` say why)."""


def test_a_run_reads_all_fields_of_transformers_that_have_no_condition_or_meet_it(tiny_dir, tmp_path, reads):
    data = write_records(tmp_path)
    recipe = load_recipe(None, run_settings(tiny_dir, data, tmp_path / "run", "training.max_steps=2"))
    reads.clear()
    assert train_function(recipe).steps == 2
    fields = {name for name in argument_types() if name not in FIXED and name not in RENAMED.values()}
    unread = {name for name in fields if f"training.{name}" not in reads and is_read(recipe, f"training.{name}")}
    assert {name for name in unread if installed_name(name) == name} - BY_TRAINING_ARGUMENTS == ACCEPTED
