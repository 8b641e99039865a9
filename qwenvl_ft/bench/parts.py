"""Compares the chunked loss and per-sample attention with their plain forms; memory is measured in a new process."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.errors import BenchError
from qwenvl_ft.model.packed_attention import packed_attention
from qwenvl_ft.training.loss import HeadLoss

LOSSES = ("plain", "chunked")


def bench_loss(
    *, tokens: int = 16_384, supervised_share: float = 0.25, vocabulary: int = 151_936, width: int = 256
) -> dict[str, Any]:
    """Measure peak memory and time of language head and cross entropy, forward and backward, in float32.

    ``plain`` computes the logits of all tokens, as most trainers do; ``chunked`` is `HeadLoss` on supervised tokens.

    Returns:
        For each: ``gib`` above the memory before, ``seconds``, and the ``loss`` and ``gradient`` (its norm), which
        show that both are the same.
    """
    results = {}
    for kind in LOSSES:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            results[kind] = pool.apply(_loss, (kind, tokens, supervised_share, vocabulary, width))
    return {"tokens": tokens, "supervised_share": supervised_share, "vocabulary": vocabulary, "width": width} | results


def _loss(kind: str, tokens: int, supervised_share: float, vocabulary: int, width: int) -> dict[str, float]:
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        head = nn.Linear(width, vocabulary, bias=False)
        hidden = torch.randn(1, tokens, width, requires_grad=True)
        labels = torch.full((tokens,), IGNORE)
        keep = torch.randperm(tokens)[: int(tokens * supervised_share)].sort()[0]
        labels[keep] = torch.randint(0, vocabulary, (len(keep),))
    _held(on_gpu)
    before, begin = _held(on_gpu), time.perf_counter()
    if kind == "plain":
        loss = F.cross_entropy(head(hidden)[0].float(), labels, ignore_index=IGNORE, reduction="sum")
    else:
        stand_in = HeadLoss(head.forward)
        stand_in.targets = labels[keep]
        loss = stand_in(hidden[:, keep])
    loss.backward()
    gradient = hidden.grad.norm().item() if hidden.grad is not None else 0.0
    seconds = time.perf_counter() - begin
    return {"gib": _held(on_gpu) - before, "seconds": seconds, "loss": loss.item(), "gradient": gradient}


def _held(on_gpu: bool) -> float:
    """Return the peak memory since the last call, in GiB, and reset the peak."""
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class _Layer(nn.Module):
    """The attributes of a layer that transformers' attention functions read."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.train()


def bench_attention(
    *, tokens: int = 8192, samples: int = 32, heads: int = 16, kv_heads: int = 8, size: int = 64, rounds: int = 3
) -> dict[str, Any]:
    """Time attention over one packed row, forward and backward: per sample, and SDPA with the block mask.

    Returns:
        Seconds of each (the best of ``rounds`` alternating turns), their ratio, and the largest output difference.
    """
    if samples > tokens:
        raise BenchError(f"{samples} samples do not fit into a row of {tokens} tokens. Lower samples.")
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    cuts = torch.randperm(tokens - 1)[: samples - 1].sort()[0] + 1
    borders = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).to(torch.int32)
    owner = torch.repeat_interleave(torch.arange(samples), borders.diff().long())
    mask = ((owner[:, None] == owner[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril())[None, None]
    layer, mask, borders = _Layer(heads // kv_heads), mask.to(device), borders.to(device)
    inputs = q, k, v = [
        torch.randn(1, count, tokens, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    ]
    options: dict[str, Any] = {
        "cu_seq_lens_q": borders,
        "max_length_q": int(borders.diff().max()),
        "scaling": size**-0.5,
    }
    forms: dict[str, Callable[[], Tensor]] = {
        "per_sample": lambda: packed_attention(layer, q, k, v, None, **options)[0],
        "block_mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2),
    }
    seconds = {name: float("inf") for name in forms}
    outputs = {}
    for _ in range(rounds):
        for name, form in forms.items():
            taken, outputs[name] = _timed(form, inputs, device)
            seconds[name] = min(seconds[name], taken)
    difference = (outputs["per_sample"] - outputs["block_mask"]).abs().max().item()
    ratio = seconds["block_mask"] / seconds["per_sample"]
    return {"tokens": tokens, "samples": samples, "times_faster": ratio, "largest_difference": difference} | seconds


def _timed(form: Callable[[], Tensor], inputs: list[Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    out = form()
    torch.autograd.grad(out.float().square().sum(), inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out.detach()
