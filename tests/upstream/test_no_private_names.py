"""Only upstream/ uses private names of other libraries."""

import ast
import importlib
import inspect
import pkgutil

import pytest
from private_names import borrowed, findings, own_names

import qwenvl_ft


def test_no_file_outside_the_room_uses_a_private_name():
    assert not findings()


def test_the_room_itself_has_some():
    """Guard of the test above: the scan finds private names where they are."""
    assert len(findings(without=())) > 10


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.utils.chat_template_utils import _compile_jinja_template",
        "from torch._dynamo.utils import counters",
        "import torch._dynamo",
        "config._attn_implementation",
        "super()._save(folder)",
        "module.forward = other",
        "module.__class__ = Other",
        "sys.modules[__name__].__class__ = Own",
        "setattr(module, 'forward', other)",
        "hasattr(source, '_plan')",
        "vars(module)['forward'] = other",
        "importlib.import_module('torch._dynamo')",
        "part.__getstate__()",
        "function.__code__",
        "'mismatch' in str(error)",
    ],
)
def test_each_way_of_borrowing_is_seen(line):
    tree = ast.parse(line)
    assert list(borrowed(tree, own_names(tree)))


@pytest.mark.parametrize(
    "line",
    ["self._own = 1; other._own", "os._exit(1)", "entry._replace(a=1)"],
)
def test_names_of_our_own_and_documented_ones_are_not(line):
    tree = ast.parse(line)
    assert not list(borrowed(tree, own_names(tree)))


def test_a_name_that_another_file_of_ours_defines_counts_as_foreign(tmp_path):
    (tmp_path / "one.py").write_text("class Own:\n    def __init__(self):\n        self._flattened = 1\n")
    (tmp_path / "two.py").write_text("def f(encoding):\n    return encoding._flattened\n")
    assert [line.split(":")[0].split("/")[-1] for line in findings(tmp_path)] == ["two.py"]


def classes():
    """Yield every class of the package outside of upstream/, with the module that defines it."""
    for entry in pkgutil.walk_packages(qwenvl_ft.__path__, "qwenvl_ft."):
        if entry.name.startswith("qwenvl_ft.upstream"):
            continue
        module = importlib.import_module(entry.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == entry.name:
                yield kind


def overridden(kind):
    """Return the private methods of a class that a base class from another library also has."""
    foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith(("qwenvl_ft", "builtins"))]
    for name, value in vars(kind).items():
        written = inspect.isfunction(value) or isinstance(value, property | staticmethod | classmethod)
        if written and name.startswith("_") and not name.startswith("__") and not name.endswith("__"):
            yield from (f"{kind.__qualname__}.{name} of {base.__qualname__}" for base in foreign if name in vars(base))


def test_no_class_outside_the_room_overrides_a_private_method():
    assert not [
        line
        for kind in classes()
        for line in overridden(kind)
        if not line.endswith(("Enum", "Function"))  # what Python and torch put into their classes
    ]


def test_an_override_would_be_seen():
    from qwenvl_ft.upstream.trainer import PlannedTrainer

    assert "PlannedTrainer._run_epoch of Trainer" in list(overridden(PlannedTrainer))
