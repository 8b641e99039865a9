"""Finds private names of other libraries in a package, by its syntax tree.

python tests/private_names.py [FOLDER]    # prints one line per use
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "qwenvl_ft"
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make"}
"""Underscored names that Python documents as public: os._exit, and those of named tuples."""
INNARDS = {
    "__code__",
    "__globals__",
    "__closure__",
    "__defaults__",
    "__kwdefaults__",
    "__wrapped__",
    "__self__",
    "__func__",
    "__getstate__",
}
"""Internals of functions, methods and pickles; reading them on foreign objects depends on their implementation."""
MESSAGES = {f"str({name})" for name in ("error", "exception", "cause", "warning", "warning.message", "caught")}
"""Expressions for the text of foreign errors and warnings, which changes between versions."""
REPLACED = {"forward", "__class__"}
ASKING = {"getattr", "hasattr", "setattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED and name != "_"


def own_names(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines itself; those of our other files count as foreign."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        is_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        if is_self and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def borrowed(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and source text of each private name of another library in one file."""
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("qwenvl_ft"):
            names = [*node.module.split("."), *(name.name for name in node.names)]
            text = next((name for name in names if is_private(name)), "") and ast.unparse(node)
        elif isinstance(node, ast.Import):
            text = next((n.name for n in node.names if any(map(is_private, n.name.split(".")))), "")
        elif isinstance(node, ast.Attribute):
            of_super = ast.unparse(node.value) == "super()"
            foreign = is_private(node.attr) and (node.attr not in own or of_super)
            replaces = node.attr in REPLACED and isinstance(node.ctx, ast.Store)
            text = ast.unparse(node) if foreign or replaces or node.attr in INNARDS else ""
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and _in_innards(node):
            text = ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            text = ast.unparse(node) if any(map(is_private, name.split("."))) else ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ASKING and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            sets = ast.unparse(node.func) == "setattr" and name in REPLACED
            foreign = isinstance(name, str) and ((is_private(name) and name not in own) or name in INNARDS)
            text = ast.unparse(node) if foreign or sets else ""
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            right = node.comparators[0]
            of_text = isinstance(right, ast.Call) and ast.unparse(right) in MESSAGES
            text = ast.unparse(node) if of_text and isinstance(node.left, ast.Constant) else ""
        if text:
            yield node.lineno, text


def _in_innards(node: ast.Subscript) -> bool:
    """Return True for ``vars(x)["forward"]`` and ``x.__dict__["forward"]``."""
    holder, name = ast.unparse(node.value), ast.unparse(node.slice).strip("'")
    return name in REPLACED and (holder.startswith("vars(") or holder.endswith(".__dict__"))


def findings(package: Path = PACKAGE, *, without: tuple[str, ...] = ("upstream",)) -> list[str]:
    """Return one line per private name of another library in a package, leaving out the folders in ``without``."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(package.rglob("*.py"))}
    return [
        f"{file.relative_to(package.parent)}:{line}: {text}"
        for file, tree in trees.items()
        if file.relative_to(package).parts[0] not in without
        for line, text in sorted(borrowed(tree, own_names(tree)))
    ]


if __name__ == "__main__":
    found = findings(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    print(*found, f"{len(found)} in {len({line.split(':')[0] for line in found})} files", sep="\n")
