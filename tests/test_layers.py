"""Imports go one way: a module only imports from its own layer and those below."""

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
"""Layers from the bottom up; modules of one layer may import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    """Yield the top-level parts of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwenvl_ft."):
            yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("qwenvl_ft."))


def wrong_imports(files):
    violations = []
    for path in files:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        above = [other for other in imported(path) if LEVEL[other] > LEVEL[part]]
        violations += [f"{path.relative_to(ROOT)} imports {other}" for other in above]
    return violations


def test_no_module_imports_from_above():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 50
    assert not wrong_imports(files)


def test_the_check_finds_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text("def f():\n    from qwenvl_ft.training.trainer import QwenVLTrainer\n")
    assert wrong_imports([tmp_path / "data" / "bad.py"]) == ["data/bad.py imports training"]
