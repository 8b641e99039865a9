"""Conversion of values from files and command lines to the types of their keys."""

from dataclasses import MISSING, fields
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.keys import argument_types
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.values import convert, parse_text

GOOD = [
    ("1e-5", float, 1e-5),
    ("5", float, 5),
    (3, float, 3),
    ("1e3", int, 1000),
    ("-1", int, -1),
    ("256*28*28", int, 200_704),
    (" 2 * 3 ", int | None, 6),
    ("2**9", int, RecipeError),
    ("9*9*9*9*9", int, RecipeError),
    (8.0, int, 8),
    ("True", bool, True),
    ("off", bool, False),
    (1, bool, True),
    (7, str, "7"),
    (True, str, "true"),
    ("null", int | None, None),
    ("None", str | None, None),
    ("None", str, "None"),
    ("no", Literal["no", "steps"], "no"),
    (False, Literal["no", "steps"], "no"),
    (False, SchedulerType | str, RecipeError),
    ("cosine", SchedulerType | str, "cosine"),
    ("linear-ish", SchedulerType | str, RecipeError),
    ("q_proj v_proj", list[str], ["q_proj", "v_proj"]),
    ("q_proj,v_proj", list[str], ["q_proj", "v_proj"]),
    ('["q_proj", "v_proj"]', list[str], ["q_proj", "v_proj"]),
    ("[q_proj, v_proj]", list[str], ["q_proj", "v_proj"]),
    (["1", 2], list[int], [1, 2]),
    ("a, b", str | list[str], "a, b"),
    ("[a, b]", str | list[str], ["a", "b"]),
    ("[a, b", str | list[str], RecipeError),
    ('{"a": 1e-6}', dict[str, Any], {"a": 1e-6}),
    ("{a: 1e-6}", dict[str, Any] | str | None, {"a": 1e-6}),
    ("file.json", dict[str, Any] | str | None, "file.json"),
    ({0: "40GB"}, dict[str, Any] | None, {"0": "40GB"}),
    ({"a": "1"}, dict[str, int], {"a": 1}),
    ("You are: x", str, "You are: x"),
    ("inf", float, RecipeError),
    ("", int, RecipeError),
    ("8.5", int, RecipeError),
    (2.5, bool, RecipeError),
    (True, float, RecipeError),
    ("true", str | bool | None, True),
    ("auto", str | bool | None, "auto"),
    ([1], str, RecipeError),
    (0, Annotated[int, ">0"], RecipeError),
    (0, Annotated[int, ">=0"], 0),
    (None, Annotated[int | None, ">0"], None),
    (1.0, Annotated[float, "0..1"], RecipeError),
]


@pytest.mark.parametrize(("value", "kind", "expected"), GOOD, ids=lambda value: str(value)[:40])
def test_a_value_is_converted_to_its_type_or_is_an_error(value, kind, expected):
    if expected is RecipeError:
        with pytest.raises(RecipeError, match=r"^here: "):
            convert(value, kind, "here")
        return
    converted = convert(value, kind, "here")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-6", 1e-6), ("8", 8), ("no", False), ("null", None), ("a: b", {"a": "b"}), ("{a", "{a"), ("a=b", "a=b")],
)
def test_text_without_a_type_is_parsed_as_yaml(text, expected):
    converted = parse_text(text)
    assert converted == expected
    assert type(converted) is type(expected)


SPELLINGS = {
    bool: ("true", True),
    int: ("3", 3),
    float: ("0.5", 0.5),
    dict: ('{"a": true}', {"a": True}),
    str: ("x", "x"),
    list: ("x", ["x"]),
}
"""Type -> text on the command line and its value; a field is tested with the first type that it has."""
OWN_SPELLINGS = {"parallelism_config": ('{"dp_shard_size": 2}', {"dp_shard_size": 2})}
"""Field -> its text and value, where those of its type are not valid."""
MUST_BE_GIVEN = ("output_dir",)
"""Fields whose default in transformers is None, but that need a value here."""


def choices(kind):
    """Return the choices of the first Literal in an annotation."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    inner = get_args(kind) if get_origin(kind) in (Annotated, Union, UnionType) else ()
    return next(filter(None, map(choices, inner)), ())


def plain_types(kind):
    if get_origin(kind) in (Annotated, Union, UnionType):
        return {plain for inner in get_args(kind) if not isinstance(inner, str) for plain in plain_types(inner)}
    return {get_origin(kind) or kind}


@pytest.mark.parametrize("entry", [f for f in fields(TrainingArguments) if f.init], ids=lambda f: f.name)
def test_every_field_of_training_arguments_is_converted_by_its_annotation(entry):
    """Both its default and text of its type are valid values."""
    kind = argument_types()[entry.name]
    default = entry.default if entry.default is not MISSING else entry.default_factory()
    if entry.name not in MUST_BE_GIVEN:
        assert convert(default, kind, "here") == getattr(default, "value", default)
    enums = [plain for plain in plain_types(kind) if isinstance(plain, type) and issubclass(plain, Enum)]
    if enums:
        assert all(convert(member.value, kind, "here") == member.value for member in enums[0])
        with pytest.raises(RecipeError, match="is not one of the choices"):
            convert("no such choice", kind, "here")
    elif choices(kind) and not {str, int} & plain_types(kind):
        assert all(convert(word, kind, "here") == word for word in choices(kind))
        with pytest.raises(RecipeError, match="is not one of the choices"):
            convert("no such choice", kind, "here")
    else:
        by_type = next((spelling for plain, spelling in SPELLINGS.items() if plain in plain_types(kind)), None)
        word, value = OWN_SPELLINGS.get(entry.name, by_type)
        assert convert(word, kind, "here") == convert(value, kind, "here") == value


def test_a_value_of_a_type_that_text_cannot_hold_is_refused():
    with pytest.raises(RecipeError, match="cannot be written in a recipe"):
        convert("x", complex, "here")


def test_every_schedule_is_a_choice():
    for kind in SchedulerType:
        assert load_recipe(None, [f"training.lr_scheduler_type={kind.value}"])
    with pytest.raises(RecipeError, match=r"'cosin' is not one of the choices\. Did you mean 'cosine'\?"):
        load_recipe(None, ["training.lr_scheduler_type=cosin"])


def test_text_stays_text_from_the_command_line():
    """YAML would read each of these texts as something else."""
    for text in ("You are: helpful", "yes", "007", "1e3", "2024_01_01", "[not a list", "{x}", "# hash", "a=b"):
        for argv in (["--system_prompt", text], [f"--system_prompt={text}"], [f"template.system_prompt={text}"]):
            assert recipe_from_argv(argv).template.system_prompt == text


def test_numbers_in_files_may_have_any_usual_notation(write):
    path = write("a.yaml", "training: {learning_rate: 1e-5, vit_lr: 1.0E-6, aligner_lr: '2e-5', weight_decay: 0}")
    recipe = load_recipe(path)
    assert (recipe.training.learning_rate, recipe.training.vit_lr, recipe.training.aligner_lr) == (1e-5, 1e-6, 2e-5)
    assert recipe.training.arguments["weight_decay"] == 0
