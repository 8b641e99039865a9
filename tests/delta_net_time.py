"""Times a gated delta net over a packed row: with restarts, without them, and sample by sample.

    PYTHONPATH=. python tests/delta_net_time.py --write    # write the table in docs/performance.md

One decoder layer of a Qwen3.5 with the released sizes of a head and random weights, forward and backward, in float32,
by torch's own kernels. The three ways take turns; each figure is the median of the rounds.
"""

import argparse
import platform
import statistics
import time
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import transformers
from marked_pages import write_between
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from qwenvl_ft.upstream.delta_net import restart_at_borders

TOKENS, SAMPLES, HEADS, HIDDEN = 8192, 32, 1, 256
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- by tests/delta_net_time.py -->", "<!-- end -->"


def small_model() -> Qwen3_5TextModel:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=2 * HEADS,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["linear_attention"],
        initializer_range=0.05,
        use_cache=False,
    )
    return Qwen3_5TextModel(config).train()


def unequal_lengths() -> list[int]:
    """Return `SAMPLES` lengths from about a third to five thirds of their mean, that sum to `TOKENS`."""
    mean = TOKENS // SAMPLES
    lengths = [mean * (SAMPLES + 2 * i) // (3 * SAMPLES) for i in range(SAMPLES)]
    lengths = [length + mean // 3 for length in lengths]
    lengths[-1] += TOKENS - sum(lengths)
    draw = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    return [lengths[i] for i in draw.tolist()]


def outputs(model: Qwen3_5TextModel, embeds: torch.Tensor, pieces: list[slice]) -> torch.Tensor:
    """Compute each piece of the row by itself, forward and backward, and return the hidden states [1, T, D]."""
    found = []
    for piece in pieces:
        part = embeds[:, piece].clone().requires_grad_()
        place = torch.arange(part.shape[1]).expand(4, 1, -1)
        hidden = model(inputs_embeds=part, position_ids=place, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        found.append(hidden.detach())
    model.zero_grad(set_to_none=True)
    return torch.cat(found, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{PAGE.name}")
    arguments = parser.parse_args()
    lengths = unequal_lengths()
    embeds = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    plain, restarting = small_model(), small_model()
    assert restart_at_borders(restarting, lambda borders, positions, rows, tokens: lengths) == 1
    whole = [slice(0, TOKENS)]
    samples = [slice(start, end) for start, end in pairwise([0, *accumulate(lengths)])]
    ways = {
        "one row with restarts": (restarting, whole),
        "one row without, which leaks": (plain, whole),
        "sample by sample": (plain, samples),
    }
    results = {way: outputs(model, embeds, pieces) for way, (model, pieces) in ways.items()}  # also the warm-up
    exact, packed, leaking = (results[way] for way in ("sample by sample", *list(ways)[:2]))
    off = float((packed - exact).abs().max())
    assert off < 1e-4 < 1e-2 < float((leaking - exact).abs().max()), "the packed row is not its samples"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, (model, pieces) in ways.items():
            begin = time.perf_counter()
            outputs(model, embeds, pieces)
            seconds[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    base = medians["one row without, which leaks"]
    lines = [
        f"{TOKENS:,} tokens of {SAMPLES} samples, the longest of {max(lengths)}; one layer with {HEADS} key head, "
        f"{2 * HEADS} value heads and hidden size {HIDDEN}; {time.strftime('%Y-%m-%d')}, "
        f"{torch.get_num_threads()} threads of a {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}. With restarts the row is off by at most {off:.0e}.",
        "",
        "| way | seconds | ratio |",
        "| --- | --- | --- |",
        *(f"| {way} | {value:.2f} | {value / base:.2f} |" for way, value in medians.items()),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_between(PAGE, BEGIN, END, "\n".join(lines))


if __name__ == "__main__":
    main()
