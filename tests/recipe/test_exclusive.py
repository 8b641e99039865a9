"""A recipe does not depend on the order of its keys: keys that exclude or outweigh each other follow one table."""

from itertools import combinations, permutations

import pytest
import yaml
from recipe_cases import sample, value_of

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.dialects import ALIASES
from qwenvl_ft.recipe.exclusive import GROUPS
from qwenvl_ft.recipe.keys import argument_types, own_types, type_of
from qwenvl_ft.recipe.layers import OVERRIDE, Layer, set_override
from qwenvl_ft.recipe.load import build_recipe, load_recipe
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS

SETTINGS = {
    "training.max_steps": 7,
    "training.num_train_epochs": 5,
    "training.bf16": True,
    "training.fp16": True,
    "deepspeed.enabled": True,
    "training.fsdp": "full_shard",
    "model.device_map": "auto",
    "tuner.target_regex": "q_proj",
    "tuner.target_modules": ["k_proj"],
    "data.val": "v.jsonl",
    "data.split_dataset_ratio": 0.5,
    "tuner.boft_block_num": 2,
    "tuner.boft_block_size": 8,
}
"""Key of a group -> a value with which it takes part."""
NEEDED = {"tuner.boft_block_num": ["tuner.train_type=boft"], "tuner.boft_block_size": ["tuner.train_type=boft"]}
PAIRS = [(group, pair) for group in GROUPS for pair in permutations(group.keys, 2)]


def default(key):
    section, _, name = key.partition(".")
    return getattr(SECTIONS[section](), name) if name in own_types(section) else HF_DEFAULTS.get(name)


def got(recipe, key):
    try:
        return value_of(recipe, key)
    except AttributeError:
        return None


def word(key):
    value = SETTINGS[key]
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"


def text_of(settings):
    """Return a recipe file with these dotted keys in this order."""
    lines = []
    for key, value in settings:
        section, _, name = key.partition(".")
        lines.append(f"{section}: {yaml.safe_dump({name: value}, default_flow_style=True).strip()}")
    return "\n".join(lines) if len({line.partition(":")[0] for line in lines}) == len(lines) else nested(settings)


def nested(settings):
    section = settings[0][0].partition(".")[0]
    assert all(key.partition(".")[0] == section for key, _ in settings)
    return yaml.safe_dump({section: {key.partition(".")[2]: value for key, value in settings}}, sort_keys=False)


def test_every_key_of_the_table_exists_and_has_a_case_here():
    keys = {key for group in GROUPS for key in group.keys}
    assert keys == SETTINGS.keys()
    assert all(type_of(key) is not None for key in keys)


@pytest.mark.parametrize(
    ("group", "pair"), PAIRS, ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_two_keys_of_a_group_are_an_error_or_the_first_wins_in_either_order(group, pair, write):
    needed = NEEDED.get(pair[0], [])
    file = write("a.yaml", text_of([(key, SETTINGS[key]) for key in pair]))
    for load in (lambda: load_recipe(None, [*needed, *map(word, pair)]), lambda: load_recipe(file, needed)):
        if group.first_wins:
            recipe = load()
            winner = min(pair, key=group.keys.index)
            assert [got(recipe, key) == SETTINGS[key] for key in pair] == [key == winner for key in pair]
        else:
            with pytest.raises(RecipeError, match=rf"exclude each other: {group.why}\. Keep one\.") as caught:
                load()
            assert all(key in str(caught.value) for key in pair)


@pytest.mark.parametrize(
    ("group", "pair"), PAIRS, ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_a_key_of_a_stronger_layer_replaces_the_others_of_its_group(group, pair, write):
    weak, strong = pair
    needed = NEEDED.get(weak, [])
    file = write("weak.yaml", text_of([(weak, SETTINGS[weak])]))
    top = write("top.yaml", f"extends: weak.yaml\n{text_of([(strong, SETTINGS[strong])])}")
    assert got(load_recipe(file, needed), weak) == SETTINGS[weak] != default(weak)
    for recipe in (load_recipe(file, [*needed, word(strong)]), load_recipe(top, needed)):
        assert (got(recipe, strong), got(recipe, weak)) == (SETTINGS[strong], default(weak))
        assert recipe.origin(weak) == "default"


def test_a_saved_recipe_holds_all_keys_and_excludes_none(write, tmp_path):
    for number, key in enumerate(SETTINGS):
        recipe = load_recipe(None, [*NEEDED.get(key, []), word(key)])
        recipe.save(tmp_path / f"{number}.yaml")
        assert load_recipe(tmp_path / f"{number}.yaml") == recipe


def test_warmup_steps_win_over_warmup_ratio_as_in_transformers():
    for words in permutations(["--warmup_steps=100", "--warmup_ratio=0.1"]):
        assert value_of(recipe_from_argv(list(words)), "training.warmup_steps") == 100
    for words in permutations(["training.warmup_steps=0", "training.warmup_ratio=0.1"]):
        assert value_of(load_recipe(None, words), "training.warmup_steps") == 0.1


def test_a_command_line_replaces_the_warmup_of_a_recipe_in_either_spelling(write):
    for weak, strong in permutations(["warmup_steps: 100", "warmup_ratio: 0.1"]):
        file = write("a.yaml", f"training: {{{weak}}}")
        recipe = load_recipe(file, ["training." + strong.replace(": ", "=")])
        assert value_of(recipe, "training.warmup_steps") == float(strong.split()[1])


def test_names_of_one_key_with_unlike_values_are_an_error_that_names_both():
    for words in permutations(["--lora_r=4", "tuner.lora_rank=8"]):
        with pytest.raises(RecipeError) as caught:
            recipe_from_argv(list(words))
        assert str(caught.value) == (
            "override: --lora_r=4 and tuner.lora_rank=8 exclude each other: both set tuner.lora_rank. Keep one."
        )
    assert recipe_from_argv(["--lora_r=8", "tuner.lora_rank=8"]).tuner.lora_rank == 8
    assert recipe_from_argv(["--lora_rank=4", "tuner.lora_rank=8"]).tuner.lora_rank == 8, "the same name, repeated"


def test_a_file_may_not_set_a_key_twice_by_two_sections(write):
    for sections in permutations(["data: {train: a.jsonl}", "custom: {train: b.jsonl}"]):
        with pytest.raises(RecipeError, match=r"custom\.train=\"?'?b.* and data\.train=.*both set data\.train"):
            load_recipe(write("a.yaml", "\n".join(sections)))


def test_a_name_of_data_outweighs_a_placeholder_in_any_order_and_in_a_file(write):
    for words in permutations(["--jsonl=a", "--dataset=Placeholder", "--dataset_use=a"]):
        assert recipe_from_argv(list(words)).data.train == "a"
    for keys in permutations(["jsonl: a", "dataset: placeholder"]):
        assert load_recipe(write("a.yaml", f"data: {{{', '.join(keys)}}}")).data.train == "a"


def test_two_names_of_data_are_an_error_in_any_order_and_in_a_file(write):
    """A file's name does not outweigh data that are named otherwise: they would be dropped without a word."""
    both = r"both set data\.train"
    for words in permutations(["--jsonl=a", "--dataset=placeholder", "--dataset_use=other"]):
        with pytest.raises(RecipeError, match=both):
            recipe_from_argv(list(words))
    for keys in permutations(["jsonl: a", "dataset: b"]):
        with pytest.raises(RecipeError, match=both):
            load_recipe(write("a.yaml", f"data: {{{', '.join(keys)}}}"))
    for keys in permutations(["val_jsonl: a", "val_dataset: b"]):
        with pytest.raises(RecipeError, match=r"both set data\.val"):
            load_recipe(write("a.yaml", f"data: {{{', '.join(keys)}}}"))


def test_a_mapping_and_one_of_its_keys_are_an_error_in_either_order():
    both = ["training.lr_scheduler_kwargs={a: 1}", "training.lr_scheduler_kwargs.b=2"]
    for overrides in permutations(both):
        with pytest.raises(RecipeError, match=r"lr_scheduler_kwargs and training.*\.b are both set"):
            load_recipe(None, overrides)


def test_a_stronger_layer_may_set_one_of_the_lengths_that_global_max_length_set(write):
    file = write("a.yaml", "global_max_length: 2000\ntemplate: {max_length: 100}")
    recipe = load_recipe(file, ["template.max_length=50"])
    assert (recipe.template.max_length, recipe.model.max_model_len, recipe.global_max_length) == (50, 2000, None)
    recipe.save(file.with_name("saved.yaml"))
    assert load_recipe(file.with_name("saved.yaml")) == recipe
    again = load_recipe(file, ["global_max_length=null"])
    assert (again.template.max_length, again.model.max_model_len) == (100, None)


@pytest.mark.soak
def test_for_every_pair_of_training_keys_either_order_gives_the_same_recipe():
    """Among them all names of each key. A value of an unlike spelling comes from the alias's own type."""
    types_of = {name: type_of(f"training.{name}") for name in (*own_types("training"), *argument_types())}
    for name, alias in ALIASES.items():
        if "training" in alias.sections:
            types_of[name] = alias.kind if alias.kind is not None else type_of(alias.keys[0])
    values = {name: sample(kind, HF_DEFAULTS.get(name)) for name, kind in types_of.items()} | {"optimizer": "sgd"}
    assert len(values) > 120
    outcomes = {True: 0, False: 0}
    different = []
    for pair in combinations(values, 2):
        one, other = (outcome([(name, values[name]) for name in order]) for order in (pair, pair[::-1]))
        if one != other and not (isinstance(one, str) and isinstance(other, str)):  # of two faults one is named
            different.append((pair, one, other))
        outcomes[isinstance(one, str)] += 1
    assert not different, different[:5]
    assert min(outcomes.values()) > 300, f"vacuous: {outcomes} errors and recipes"


def outcome(settings):
    """Return the resolved recipe of overrides of ``training`` in this order, or the message of the error."""
    layer = Layer(OVERRIDE)
    try:
        for name, value in settings:
            set_override(layer, f"training.{name}", value)
        return build_recipe([layer]).to_dict()
    except RecipeError as error:
        return str(error)


def test_every_two_names_of_a_key_agree_in_either_order():
    """The same for the names of all keys, as flags with words that some of them take."""
    names = {}
    for name, alias in ALIASES.items():
        for key in alias.keys:
            names.setdefault(key, [f"--{key}"]).append(f"--{name}")
    recipes = 0
    for key, spellings in names.items():
        for pair in combinations(spellings, 2):
            if len({name.rpartition(".")[2].removeprefix("--") for name in pair}) == 1:
                continue  # one name, which a command line may repeat
            for texts in (("true", "false"), ("0.5", "0.25"), ("3", "4"), ("zero3", "zero2"), ("true", "true")):
                words = [f"{name}={text}" for name, text in zip(pair, texts, strict=True)]
                one, other = (outcome_of(order) for order in (words, words[::-1]))
                assert one == other or (isinstance(one, str) and isinstance(other, str)), f"{key}: {words}"
                recipes += isinstance(one, dict)
    assert recipes > 20


def outcome_of(words):
    try:
        return recipe_from_argv(words).to_dict()
    except RecipeError as error:
        return str(error)


def test_the_message_does_not_give_the_value_of_a_key_as_the_value_of_a_flag_with_another_meaning():
    expected = (
        "override: --freeze_llm=true and --tune_mm_llm (which sets false) exclude each other: both set "
        "tuner.freeze_llm. Keep one."
    )
    assert outcome_of(["--tune_mm_llm", "True", "--freeze_llm", "True"]) == expected
