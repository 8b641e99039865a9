"""A packed row equals its samples alone with the kernels of flash-linear-attention, in triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.soak,
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("fla") and find_spec("triton")), reason="needs fla-core and triton"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("fla") / "measured.pt"
    script = Path(__file__).with_name("fla_on_cpu.py")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=500, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file, weights_only=False)


def test_a_packed_row_equals_its_samples_alone(measured):
    (alone, expected), (packed, own), (leaking, _) = (measured[name] for name in ("alone", "packed", "leaking"))
    assert (packed - alone).abs().max() <= 1e-5
    assert (leaking - alone).abs().max() > 1, "vacuous: the plain row agrees too"
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (own[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_the_kernels_ran(measured):
    """In two layers, three times for the samples alone, and once for each of two packed rows."""
    assert measured["calls"] == 2 * 5
    (alone, _), plain = measured["alone"], measured["torch"]
    torch.testing.assert_close(alone, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(alone, plain), "torch's own loop ran"
