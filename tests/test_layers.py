"""Imports go one way: a module knows only what stands below it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "qwenvl_ft"
LAYERS = [
    {"errors"},
    {"upstream"},
    {"recipe"},
    {"model", "data"},
    {"tuning"},
    {"checkpoint", "export", "evaluation"},
    {"assemble"},
    {"look"},
    {"training"},
    {"prove"},
    {"bench", "cli", "flare", "train"},
]
"""From the bottom up; what stands together may know each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    """Parts of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwenvl_ft."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("qwenvl_ft."))


def wrong_imports(files):
    told = []
    for path in files:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        told += [f"{path.relative_to(ROOT)} imports {other}" for other in imported(path) if LEVEL[other] > LEVEL[part]]
    return told


def test_no_module_imports_from_above():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 50
    assert not wrong_imports(files)


def test_the_check_would_see_one(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text("def f():\n    from qwenvl_ft.training.trainer import QwenVLTrainer\n")
    assert wrong_imports([tmp_path / "data" / "bad.py"]) == ["data/bad.py imports training"]
