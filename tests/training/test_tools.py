"""template.tools_prompt takes schemas from the recipe or a file; anything else is an error of one line."""

import json

import pytest
from cases import ListRecords

from qwenvl_ft.assemble import build_processor
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.encode.tools_prompt import read_tools
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
    (tmp_path / "tools.jsonl").write_text(json.dumps(TOOL) + "\n\n")
    files = (str(tmp_path / "tools.json"), str(tmp_path / "tools.jsonl"))
    for tools_prompt in (json.dumps([TOOL]), json.dumps(TOOL), [TOOL], *files):
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
        ('{"nam": "measure"}', "schema 1 of 1 has no function name"),
        (json.dumps([TOOL, "measure"]), "schema 2 of 2 has no function name"),
        ([{"name": "measure", "parameters": ["mm"]}], "schema 1 of 1 has parameters that are no JSON schema"),
        ([{"name": "measure", "parameters": {"type": "array"}}], "parameters of another type than object"),
        ("7", "is not a JSON list of function schemas"),
    ],
)
def test_anything_else_is_one_line(tiny_dir, tools_prompt, message):
    with pytest.raises(RecipeError, match=message):
        encoder_of(tiny_dir, tools_prompt)


def test_schemas_may_be_written_in_the_recipe_and_on_the_command_line(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("template:\n  tools_prompt:\n    - {name: measure, parameters: {type: object}}\n")
    written = [{"name": "measure", "parameters": {"type": "object"}}]
    assert read_tools(load_recipe(str(recipe)).template.tools_prompt) == written
    given = load_recipe(None, [f"template.tools_prompt={json.dumps(written)}"]).template.tools_prompt
    assert read_tools(given) == written
    file = load_recipe(None, ["template.tools_prompt=tools.json"]).template.tools_prompt
    assert file == "tools.json"
