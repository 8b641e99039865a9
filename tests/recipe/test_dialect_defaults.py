"""A command line of another tool gets that tool's defaults, and the tables are those of the installed tool."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipe_cases import value_of
from transformers import TrainingArguments

from qwenvl_ft.cli.main import main
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.dialect_defaults import DIALECTS, Computed
from qwenvl_ft.recipe.dialect_kept import KEPT
from qwenvl_ft.recipe.dialect_marks import MARKS, dialect_of
from qwenvl_ft.recipe.dialects import ALIASES
from qwenvl_ft.recipe.keys import argument_types, bare_names, type_of
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.values import convert


def resolved(words):
    return recipe_from_argv(words.split())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_default_is_valid_and_differs_from_ours(dialect):
    assert MARKS.keys() == DIALECTS.keys() == KEPT.keys()
    for key, value in DIALECTS[dialect].items():
        assert type_of(key) is not None, key
        if not isinstance(value, Computed):
            convert(value, type_of(key), key)
            assert value != value_of_ours(key), f"{key} is our default anyway"
    assert all(type_of(key) is not None for key in KEPT[dialect])


def value_of_ours(key):
    section, _, name = key.partition(".")
    ours = load_recipe()
    known = name in ours.training.arguments if section == "training" else True
    return value_of(ours, key) if known or hasattr(ours.training, name) else getattr(hf_defaults(), name)


def hf_defaults():
    return TrainingArguments(output_dir="x", use_cpu=True)


NUMBERS = ("model_max_length", "max_seq_length", "mm_projector_lr", "vision_tower_lr", "lora_r", "video_fps")
OWN_FLAGS = ("ms-swift", "train_qwen.py")
WORDS = dict.fromkeys(NUMBERS, "4") | {"video_max_frames": "8", "video_min_frames": "4"}
WORDS |= dict.fromkeys(("train_type", "sft_type", "tuner_type"), "lora") | {"freeze_llm": "False"}


@pytest.mark.parametrize(("dialect", "mark"), [(name, mark) for name in OWN_FLAGS for mark in MARKS[name]])
def test_every_mark_alone_turns_packing_off(dialect, mark):
    alone = resolved(f"--{mark} {WORDS.get(mark, 'True')}")
    assert dialect in alone.origins.values()
    assert alone.training.packing == (mark == "data_packing")


def test_a_command_line_without_a_mark_is_ours():
    assert recipe_from_argv(["model.model=m", "data.train=a", "--lora_rank", "4", "--bf16"]).training.packing


@pytest.mark.parametrize(
    ("words", "samples"),
    [
        ("--model m --jsonl a --gradient_accumulation_steps 16 --padding_free true", 16),
        ("--model m --dataset a --per_device_train_batch_size 2", 16),
        ("--model m --dataset a --per_device_train_batch_size 5", 20),
        ("--model m --dataset a --train_type full --gradient_accumulation_steps 3", 3),
        ("--model_name_or_path m --dataset_use a", 8),
        ("--use_lora False --freeze_vision False --per_device_train_batch_size 1 --gradient_accumulation_steps 8", 8),
    ],
)
def test_a_step_holds_as_many_samples_as_in_the_other_tool(words, samples):
    recipe = resolved(words)
    arguments = recipe.training.arguments
    assert not recipe.training.packing
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == samples


def test_the_accumulation_of_ms_swift_depends_on_the_number_of_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert resolved("--dataset a").training.arguments["gradient_accumulation_steps"] == 6  # ceil(16 / 3)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--use_lora False", ("full", False, False, False)),
        ("--use_lora False --freeze_vision False --freeze_llm False", ("full", False, False, False)),
        ("--use_lora False --freeze_vision True", ("full", False, True, False)),
        ("--use_lora True --freeze_vision True --freeze_llm False", ("lora", False, True, True)),
        ("--use_lora True --freeze_vision True --freeze_llm False --train_mlp True", ("lora", False, True, False)),
        ("--tune_mm_llm True", ("full", False, True, True)),
        ("--tune_mm_mlp True", ("full", True, True, False)),
        ("--tune_mm_mlp True --lora_enable True", ("lora", False, True, False)),
        ("--model_name_or_path m --dataset_use d", ("lora", False, True, True)),
        ("--dataset a --train_type full", ("full", False, True, True)),
        ("--dataset a --train_type full --freeze_vit false", ("full", False, False, True)),
        ("--stage sft --finetuning_type full", ("full", False, True, True)),
        ("--finetuning_type full --freeze_multi_modal_projector false", ("full", False, True, False)),
    ],
)
def test_the_parts_that_train_are_those_of_the_other_tool(words, parts):
    """As (method, language model frozen, vision tower frozen, aligner frozen)."""
    tuner = resolved(words).tuner
    assert (tuner.train_type, tuner.freeze_llm, tuner.freeze_vit, tuner.freeze_aligner) == parts


def test_a_recipe_file_keeps_its_own_defaults():
    """It is written for this package, and flags beside it only change it."""
    flags = "--dataset a --padding_free true"
    assert resolved(f"recipe=lora_4b {flags}").training.packing
    assert resolved(f"--base_config lora_4b {flags}").training.packing
    assert not resolved(flags).training.packing, "vacuous: the flags change nothing"


def test_a_default_gives_way_to_all_that_the_user_gives(monkeypatch):
    given = "--dataset a --packing true --weight_decay 0.3 --adam_beta2 0.9 --warmup_ratio 0.1 --max_length 77"
    recipe = resolved(given)
    assert recipe.training.packing
    assert [recipe.training.arguments[key] for key in ("weight_decay", "adam_beta2", "warmup_steps")] == [0.3, 0.9, 0.1]
    assert recipe.template.max_length == 77
    monkeypatch.setenv("FPS_MAX_FRAMES", "5")
    assert resolved("--dataset_use a").template.fps_max_frames == 5


@pytest.mark.parametrize(
    ("words", "key", "unset"),
    [
        ("--dataset_use a --model_max_length 400", "template.max_pixels", None),
        ("--dataset_use a --min_pixels 999424", "template.max_pixels", None),
        ("--dataset_use a --video_min_frames 16", "template.fps_max_frames", None),
        ("--dataset_use a --max_pixels 4096", "template.min_pixels", None),
    ],
)
def test_a_default_that_would_contradict_a_flag_is_left_out(words, key, unset):
    """An error about a value that nobody gave would be a riddle."""
    assert value_of(resolved(words), key) is unset
    assert value_of(resolved("--dataset_use a"), key) is not None, "vacuous"


def test_the_length_of_a_tool_without_a_limit_is_that_of_the_model(tiny_dir):
    assert resolved(f"--model {tiny_dir} --dataset a").template.max_length == 32768
    assert resolved("--model Qwen/Qwen3-VL-4B-Instruct --dataset a").template.max_length == 262144
    assert resolved("--model elsewhere/unknown --dataset a").template.max_length == 8192
    assert resolved("--model m --dataset a --max_model_len 4096").template.max_length == 4096
    assert resolved("--model m --dataset a --global_max_length 4096").template.max_length == 4096


def test_the_recipe_command_shows_what_comes_from_the_tool(capsys):
    assert main(["recipe", "--dataset", "a.jsonl", "--lora_rank", "4"]) == 0
    rows = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert rows["training.packing"] == rows["training.adam_beta2"] == "ms-swift"
    assert (rows["tuner.lora_rank"], rows["tuner.lora_alpha"]) == ("override", "default")


def test_the_most_particular_tool_counts():
    assert dialect_of(["dataset", "use_lora"]) == "train_qwen.py"
    assert dialect_of(["dataset", "lora_rank"]) == "ms-swift"
    assert dialect_of(["lora_rank", "bf16"]) is None


# the installed ms-swift


def swift_defaults():
    """Field of ms-swift's SftArguments -> its default, read from the source: importing it needs all it depends on."""
    spec = find_spec("swift")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("ms-swift is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    base = root / "arguments" / "base_args"
    found = {}
    files = [root / "trainers" / "arguments.py", *sorted(base.glob("*_args.py")), root / "arguments" / "tuner_args.py"]
    for file in [*files, root / "arguments" / "sft_args.py"]:
        for kind in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for entry in kind.body if isinstance(kind, ast.ClassDef) else ():
                if isinstance(entry, ast.AnnAssign) and entry.value is not None:
                    found[entry.target.id] = literal(entry.value)
    return found


def literal(node):
    """The value of a default: a literal, or that of ``field(default=...)`` or ``field(default_factory=...)``."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if "default" in keywords:
        return ast.literal_eval(keywords["default"])
    factory = keywords["default_factory"]
    return ast.literal_eval(factory.body) if isinstance(factory, ast.Lambda) else []


EQUAL = {"true": True, "tensorboard": ["tensorboard"], 0: 0.0}


def ours_of(name):
    """The key that a field of ms-swift sets here; None if we have none, which is an error for its flag."""
    if name in ALIASES:
        alias = ALIASES[name]
        return alias.keys[0] if alias.kind is None else None
    return bare_names().get(name) or (f"training.{name}" if name in argument_types() else None)


def test_each_default_of_ms_swift_is_ours_or_in_the_table_or_kept_with_a_reason():
    theirs = swift_defaults()
    assert theirs["adam_beta2"] == 0.95, "vacuous: another file was read"
    compared = 0
    for name, default in theirs.items():
        key = ours_of(name)
        if key is None or key in KEPT["ms-swift"]:
            continue
        compared += 1
        listed = DIALECTS["ms-swift"].get(key)
        if isinstance(listed, Computed):
            continue
        ours = listed if key in DIALECTS["ms-swift"] else value_of_ours(key)
        same = ours == default or EQUAL.get(default if isinstance(default, str) else None) == ours
        empty = not ours and not default  # null, an empty list and "" all mean that nothing is set
        assert same or empty or (key, ours, default) in MEANS_THE_SAME, f"{key}: ours {ours!r}, theirs {default!r}"
    assert compared > 80


MEANS_THE_SAME = [
    ("model.torch_dtype", "auto", None),  # read from config.json
    ("template.truncation_strategy", "delete", None),  # __post_init__ makes it delete
    ("training.optimizer", "multimodal", None),  # one group per part; without rates of their own all are the same
    ("training.report_to", "tensorboard", ["tensorboard"]),
]


def test_fields_that_ms_swift_inherits_from_transformers_are_in_the_table_or_the_same():
    """swift_defaults has what ms-swift changes; everything else is transformers' own."""
    theirs, changed = hf_defaults(), swift_defaults()
    ours = load_recipe().training.arguments
    for name, value in ours.items():
        key, old = f"training.{name}", {"activation_checkpointing": "gradient_checkpointing"}.get(name, name)
        if old in changed or key in KEPT["ms-swift"]:
            continue
        listed = DIALECTS["ms-swift"].get(key, value)
        assert getattr(theirs, name) == listed or isinstance(listed, Computed), key
