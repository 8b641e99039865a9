"""Computes a packed row and its samples alone with flash-linear-attention; run with TRITON_INTERPRET=1.

In float32 only: the interpreter of triton 3.9 does not round products of bfloat16 as a GPU does.
"""

import builtins
import copy
import sys
import warnings
from pathlib import Path

import torch
from triton.runtime.autotuner import Autotuner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.simplefilter("ignore")  # the interpreter's numpy warns of overflows in elements that a mask removes

LENGTHS = [70, 5, 3]


class Index(int):
    """A loop variable with the method of a tensor that kernels call."""

    def to(self, dtype):
        return self


def as_compiled() -> None:
    """Add what triton 3.9 lacks on a CPU: a clock for the choice of a configuration, and loop variables as tensors."""
    Autotuner.do_bench = property(lambda self: lambda call, quantiles: [0.0, 0.0, 0.0])
    from fla.ops.common import chunk_delta_h

    chunk_delta_h.range = lambda *bounds: map(Index, builtins.range(*map(int, bounds)))


def step(model, embeds, pieces):
    """Return the hidden states [T, D] and the gradients of a fixed sum over them."""
    model.zero_grad(set_to_none=True)
    found = []
    for piece in pieces:
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[piece].expand(4, 1, -1)
        states = model(inputs_embeds=embeds[:, piece], position_ids=positions, use_cache=False).last_hidden_state[0]
        (states.float() * torch.linspace(-1, 1, states.shape[1])).sum().backward()
        found.append(states.detach())
    grads = {name: value.grad.float() for name, value in model.named_parameters() if value.grad is not None}
    return torch.cat(found).float(), grads


def main() -> None:
    as_compiled()
    torch.set_num_threads(1)
    from transformers.models.qwen3_5 import modeling_qwen3_5 as upstream

    from qwenvl_ft.upstream import delta_net

    calls = []
    kernel = upstream.torch_chunk_gated_delta_rule
    torch.manual_seed(0)
    model = upstream.Qwen3_5TextModel(delta_net._small())
    embeds = torch.randn(1, sum(LENGTHS), model.config.hidden_size)
    restarting = copy.deepcopy(model)
    delta_net.restart_at_borders(restarting, lambda borders, positions, rows, tokens: LENGTHS)
    upstream.torch_chunk_gated_delta_rule = lambda *args, **options: calls.append(1) or kernel(*args, **options)
    pieces = [slice(0, 70), slice(70, 75), slice(75, 78)]
    results = {
        "alone": step(model, embeds, pieces),
        "packed": step(restarting, embeds, [slice(None)]),
        "leaking": step(model, embeds, [slice(None)]),
    }
    results["calls"] = len(calls)
    upstream.torch_chunk_gated_delta_rule = kernel.__wrapped__
    results["torch"], _ = step(model, embeds, pieces)
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
