"""accelerate's autocast stays on a model that it prepared, and `forward_restored` removes it without a trace."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from qwenvl_ft.upstream.autocast import forward_restored
from qwenvl_ft.upstream.processes import forget_precision


class Doubling(nn.Linear):
    def forward(self, value):
        return super().forward(value) * 2


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset accelerate's settings, which another test may have set, and which others must not inherit."""
    forget_precision()
    yield
    forget_precision()


def test_a_prepared_model_computes_as_before_afterwards():
    model, value = Doubling(8, 8), torch.randn(4, 8)
    expected = model(value)
    with forward_restored(model):
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        assert not torch.equal(prepared(value), expected), "vacuous: nothing was wrapped"
    assert torch.equal(model(value), expected)
    assert "forward" not in vars(model)
    with forward_restored(model):
        again = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        assert not torch.equal(again(value), expected), "the next trainer of the same model computes without autocast"
    assert torch.equal(model(value), expected)
