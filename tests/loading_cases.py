"""Helpers of several tests of loading."""

import json
import shutil

import pytest


def edited(source, target, change):
    """Copy a checkpoint and pass its config.json through ``change``."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def last_error(kind, call):
    """Return the message of the error that ``call`` raises, after checking that it is a single line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
