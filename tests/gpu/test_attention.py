"""Packed attention equals SDPA on each sample, forward and backward, with every kernel of the device."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwenvl_ft.model import packed_attention
from qwenvl_ft.upstream.attention import VARLEN

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [300, 3, 129, 1, 64, 129]
SHAPES = {
    "text": (True, (8, 2), 128),
    "text, no grouped heads": (True, (4, 4), 128),
    "vision of 2b and 4b": (False, (16, 16), 64),
    "vision of 8b": (False, (16, 16), 72),
}
TOLERANCE = 0.02
"""Relative error allowed for bfloat16 operands."""


class Case:
    """Random queries, keys and values float64[1, H, T, D] that bfloat16 represents exactly."""

    def __init__(self, shape, device):
        self.causal, heads, self.size = SHAPES[shape]
        torch.manual_seed(len(shape))
        sizes = [(1, count, sum(LENGTHS), self.size) for count in (heads[0], heads[1], heads[1])]
        self.exact = [torch.randn(size).bfloat16().double().to(device) for size in sizes]
        self.weights = torch.randn(sizes[0], dtype=torch.float64).to(device)
        self.borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(device)
        self.module = torch.nn.Module()
        self.module.is_causal, self.module.num_key_value_groups = self.causal, heads[0] // heads[1]

    def passes(self, attend, dtype):
        """Return the output and the three gradients, float64[1, H, T, D] each."""
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in self.exact]
        out = attend(*leaves)
        (out.double() * self.weights).sum().backward()
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def alone(self, query, key, value, lengths=LENGTHS):
        """Run torch's SDPA on each sample, with keys and values repeated for grouped heads."""
        key, value = (x.repeat_interleave(self.module.num_key_value_groups, dim=1) for x in (key, value))
        samples = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([scaled_dot_product_attention(*each, is_causal=self.causal) for each in samples], dim=2)

    def packed(self, query, key, value):
        out, _ = packed_attention.packed_attention(
            self.module,
            *(query, key, value, None),
            cu_seq_lens_q=self.borders,
            max_length_q=max(LENGTHS),
            is_causal=self.causal,
            scaling=self.size**-0.5,
        )
        return out.transpose(1, 2)


def distances(found, expected):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.fixture
def kernel_calls(monkeypatch):
    """List that grows by one with every call of torch's variable-length kernel."""
    calls, plain = [], packed_attention._varlen
    monkeypatch.setattr(packed_attention, "_varlen", lambda *args: calls.append(1) or plain(*args))
    return calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_equals_its_samples_in_both_passes(shape, device, kernel_calls):
    case = Case(shape, device)
    expected = case.passes(case.alone, torch.float64)
    found = case.passes(case.packed, torch.bfloat16)
    assert max(distances(found, expected)) < TOLERANCE
    leaked = case.passes(lambda *each: case.alone(*each, lengths=[sum(LENGTHS)]), torch.float64)
    assert min(distances(leaked, expected)) > 10 * TOLERANCE, "vacuous: samples that attend to each other agree too"
    assert len(kernel_calls) == (device == "cuda" and not VARLEN.missing())


@pytest.mark.parametrize("device", DEVICES)
def test_keys_are_repeated_for_a_kernel_without_grouped_heads(device, monkeypatch):
    """torch 2.11's kernel needs as many key heads as query heads; on a CPU a stand-in has the same signature."""
    case = Case("text", device)
    kernel, heads = (None if device == "cpu" else packed_attention._kernel()), []

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        assert cu_seq_q is cu_seq_k
        if kernel is not None:
            return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)
        flat = [x.transpose(0, 1)[None].split(cu_seq_q.diff().tolist(), dim=2) for x in (query, key, value)]
        kwargs = {"is_causal": window_size == (-1, 0), "scale": scale}
        outs = [scaled_dot_product_attention(*each, **kwargs) for each in zip(*flat, strict=True)]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr(packed_attention, "_kernel", lambda: old)
    monkeypatch.setattr(packed_attention, "_kernel_dtype", lambda value: value.dtype)
    expected = case.passes(case.alone, torch.float64)
    assert max(distances(case.passes(case.packed, torch.bfloat16), expected)) < TOLERANCE
    assert heads == [(8, 8, 8)]
