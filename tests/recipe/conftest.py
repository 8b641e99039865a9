"""A fixture that writes recipe files."""

from textwrap import dedent

import pytest


@pytest.fixture
def write(tmp_path):
    """``write(name, text)`` writes a file below tmp_path and returns its path."""

    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return put
