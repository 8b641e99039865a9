"""The pictures of docs/architecture.md show the package as it is."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
AGAIN = "The picture is out of date. Draw it again: python docs/images/architecture.py"


def load_script():
    spec = importlib.util.spec_from_file_location("architecture", IMAGES / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture = load_script()


@pytest.mark.parametrize("name", architecture.PICTURES)
def test_the_stored_picture_is_what_the_script_draws_today(name):
    assert (IMAGES / name).read_text(encoding="utf-8") == architecture.PICTURES[name](), AGAIN


def test_every_part_of_the_package_is_in_the_flow_exactly_once():
    shown = [name for box in architecture.BOXES for name in re.findall(r"(\w+)/(?:\w+/|\w+\.py)?", box.name)]
    stages = {name for name in shown if name != "data"}
    assert len([name for name in shown if name != "data"]) == len(stages)
    beside = set(architecture.BESIDE)
    assert not stages & beside
    assert stages | beside | {"data"} == set(architecture.parts())


def test_every_folder_in_the_flow_exists():
    named = [path for box in architecture.BOXES if box.kind != "file" for path in box.name.split(", ")]
    assert len(named) > 10
    for path in named:
        assert (architecture.PACKAGE / path).exists(), path


def test_arrows_join_boxes_of_the_flow():
    names = {box.name for box in architecture.BOXES}
    assert {end for arrow in architecture.ARROWS for end in arrow[:2]} <= names


def test_the_imports_picture_has_a_dot_for_every_import_and_none_above_the_diagonal():
    picture = (IMAGES / "imports.svg").read_text(encoding="utf-8")
    dots = set(re.findall(r"<title>(\w+) imports (\w+)</title>", picture))
    graph = architecture.imports()
    assert dots == {(part, other) for part, others in graph.items() for other in others}
    assert ("training", "model") in dots
    place = [name for level in architecture.order(graph) for name in level]
    assert all(place.index(part) > place.index(other) for part, other in dots)


def test_a_new_import_would_change_the_picture(tmp_path, monkeypatch):
    for name, text in {"a/one.py": "", "b/two.py": "from qwenvl_ft.a.one import x\n", "__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(architecture, "PACKAGE", tmp_path)
    before = architecture.matrix()
    (tmp_path / "b/three.py").write_text("def f():\n    from qwenvl_ft import a\n")
    assert architecture.matrix() == before, "this import is shown already"
    (tmp_path / "c.py").write_text("import qwenvl_ft.b.two\n")
    after = architecture.matrix()
    assert "c imports b" in after
    assert "c imports b" not in before
    (tmp_path / "a/one.py").write_text("from qwenvl_ft.b.two import y\n")
    with pytest.raises(ValueError, match=r"in a circle: \['a', 'b', 'c'\]"):
        architecture.matrix()
