"""The second process is independent: it uses transformers and peft, and nothing of this library."""

import ast

from qwenvl_ft.prove.saved import SCRIPT


def test_the_script_imports_nothing_of_ours():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {"transformers", "peft"} <= set(names)
    assert not [name for name in names if name.startswith(("qwenvl_ft", "."))]
