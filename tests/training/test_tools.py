"""template.tools_prompt takes schemas from the recipe or a file; anything else is an error of one line."""

import json

import pytest
from cases import ListRecords

from qwenvl_ft.assemble import build_processor
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe

TOOL = {"type": "function", "function": {"name": "measure", "description": "Length", "parameters": {}}}
OWN = {"type": "function", "function": {"name": "weigh", "description": "Mass", "parameters": {}}}


def encoder_of(tiny_dir, tools_prompt):
    recipe = load_recipe(None, [f"model.model={tiny_dir}"])
    recipe.template.tools_prompt = tools_prompt
    return build_encoder(recipe, build_processor(recipe))


def text_of(encoder, **more):
    record = {"query": "How long?", "response": "12 mm"} | more
    sample = encoder(read_record(*ListRecords([record])[0]))
    return encoder.processor.tokenizer.decode(sample["input_ids"])


def test_schemas_are_shown_to_conversations_without_any(tiny_dir, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    for tools_prompt in (json.dumps([TOOL]), str(tmp_path / "tools.json")):
        encoder = encoder_of(tiny_dir, tools_prompt)
        assert '"measure"' in text_of(encoder)
        own = text_of(encoder, tools=[OWN])
        assert '"weigh"' in own
        assert '"measure"' not in own
    assert '"measure"' not in text_of(encoder_of(tiny_dir, None))


@pytest.mark.parametrize(
    ("tools_prompt", "message"),
    [
        ("react_en", "react_en is a form of tool prompts"),
        ("nowhere.json", "nowhere.json cannot be read"),
        ("You may use tools.", "is not a JSON list of function schemas"),
        ('{"name": "measure"}', "is not a JSON list of function schemas"),
    ],
)
def test_anything_else_is_one_line(tiny_dir, tools_prompt, message):
    with pytest.raises(RecipeError, match=message):
        encoder_of(tiny_dir, tools_prompt)
