"""Every example of docs/data.md works as it is written."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from cases import picture

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers import BUILT_IN, READERS, import_reader, read_record
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.recipe.load import load_recipe

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", TEXT, re.S | re.M))
RECORDS = [(name, block) for name, body in SECTIONS.items() for block in re.findall(r"```json\n(.*?)```", body, re.S)]
RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a.png", "b.png")):
        picture(640, 480, seed).save(tmp_path / name)
    return tmp_path


def test_every_format_has_a_section_and_an_example():
    assert set(SECTIONS) == set(BUILT_IN)
    assert {name for name, _ in RECORDS} == set(BUILT_IN)


@pytest.mark.parametrize(("name", "block"), RECORDS)
def test_the_example_is_recognised_and_becomes_a_sample(name, block, folder, encoder):
    example = json.loads(block)
    file = folder / ("set.json" if "annotations" in example else "set.jsonl")
    file.write_text(json.dumps(example))
    record, source, root = load_records(str(file), cache_dir=folder / "cache")[0]
    assert next(key for key, reader in READERS.items() if reader.matches(record)) == name
    sample = encoder(read_record(record, source, root))
    assert (sample["labels"] != -100).any()
    shown = encoder.processor.tokenizer.decode(sample["input_ids"])
    assert "<bbox>" not in shown
    if name == "grounding":
        written = re.search(r"`(\[\d+, \d+, \d+, \d+\])`", SECTIONS[name])
        assert written is not None
        assert written[1] in shown


def test_examples_elsewhere_are_read_too():
    others = [
        block for block in re.findall(r"```json\n(.*?)```", TEXT, re.S) if block not in [known for _, known in RECORDS]
    ]
    assert len(others) + len(RECORDS) == TEXT.count("```json")
    for block in others:
        assert read_record(json.loads(block), Source("d", "d:1"), "/r").messages


@pytest.mark.parametrize("block", RECIPES)
def test_the_recipe_loads(block, tmp_path):
    (tmp_path / "r.yaml").write_text(block)
    data = load_recipe(tmp_path / "r.yaml").data
    assert data.train
    for key, value in yaml.safe_load(block)["data"].items():
        assert getattr(data, key) == value


def test_a_custom_reader_is_used(folder, encoder, monkeypatch):
    (folder / "my_formats.py").write_text("\n".join(PYTHON))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_formats", raising=False)
    import_reader.cache_clear()
    record = {"photo": "a.png", "hour": "three"}
    conversation = read_record(record, Source("d", "d:1"), str(folder), reader="my_formats:clock")
    assert conversation.messages[1].content[0].text == "three"
    assert encoder(conversation)["image_grid_thw"].shape == (1, 3)
