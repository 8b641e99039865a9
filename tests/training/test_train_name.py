"""`qwenvl_ft.train` is the function and ``python -m qwenvl_ft.train`` the command, whatever was imported before."""

import subprocess
import sys

import pytest

IMPORTS = {
    "the function": "from qwenvl_ft import train",
    "the package": "import qwenvl_ft.train",
    "its command line": "from qwenvl_ft.train import main",
    "its function": "from qwenvl_ft.train import train as function",
}
CHECK = """
import importlib, inspect, sys
import qwenvl_ft
package = importlib.import_module("qwenvl_ft.train")
assert inspect.isfunction(qwenvl_ft.train), qwenvl_ft.train
assert qwenvl_ft.train is package.train
assert "torch" not in sys.modules and "dataclasses" not in sys.modules, "the import is not light"
"""


@pytest.mark.parametrize("name", IMPORTS)
def test_the_attribute_is_the_function_after_any_import(name):
    words = [sys.executable, "-W", "error", "-c", f"{IMPORTS[name]}\n{CHECK}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_without_a_warning():
    """Python warns if a module that it is about to run was imported before; it must not be one of those."""
    words = [sys.executable, "-W", "error", "-m", "qwenvl_ft.train", "recipe=lora_5b"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no recipe 'lora_5b'.")
    assert done.stderr.count("\n") == 1
