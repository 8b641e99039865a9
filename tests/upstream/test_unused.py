"""upstream/unused.py: packages that a command does not use are not imported, and are available afterwards."""

import importlib.util
import subprocess
import sys

import pytest

from qwenvl_ft.upstream.unused import unused


def test_inside_a_package_is_not_found_and_afterwards_it_is():
    name = "xdrlib_that_is_not_loaded" if "wave" in sys.modules else "wave"
    with unused(name):
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert importlib.util.find_spec("wave") is not None
    assert name not in sys.modules


def test_what_is_in_use_stays():
    import json as used

    with unused("json"):
        assert sys.modules["json"] is used


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_what_asks_but_once_has_asked_before():
    """transformers and accelerate choose base classes when they are imported; a later run uses deepspeed."""
    program = (
        "from qwenvl_ft.upstream.unused import unused\n"
        "with unused('deepspeed'): import transformers\n"
        "from transformers.integrations.deepspeed import HfDeepSpeedConfig\n"
        "assert HfDeepSpeedConfig.__mro__[1] is not object, HfDeepSpeedConfig.__mro__\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
