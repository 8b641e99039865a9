"""What was measured -> lines to read."""

from collections.abc import Sequence
from typing import Any

from qwenvl_ft.bench.step import StepResult


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, aligned: the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| "
        + " | ".join(f"{cell:{'<' if not column else '>'}{widths[column]}}" for column, cell in enumerate(row))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def step_text(result: StepResult) -> str:
    """A step's figures, one a line, and what its matrix work goes to."""
    told = result.told()
    flops = dict(result.model_flops)
    total = flops.pop("total")
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in flops.items() if share)
    median = sorted(result.step_ms)[result.steps // 2]
    peak = f"{result.peak_tflops:g} ({result.peak_source})"
    return "\n".join(
        [
            f"{result.size}, {result.train_type}, {result.dtype}, {result.attention}, on {result.device}",
            f"  {result.steps} steps of {result.tokens / result.steps:,.0f} tokens "
            f"({result.samples / result.steps:.1f} samples, {result.images / result.steps:.1f} images)",
            f"  tokens/s             {told['tokens_per_second']:>12,.1f}",
            f"  supervised tokens/s  {told['supervised_tokens_per_second']:>12,.1f}",
            f"  step, ms             {1e3 * result.seconds / result.steps:>12,.1f}   median {median:,.1f}",
            f"  peak memory, GiB     {result.peak_memory_gib:>12,.2f}",
            f"  needed TFLOP/s       {told['tflops_per_second']:>12,.3f}   of {peak}",
            f"  MFU                  {told['mfu']:>12.1%}   {shares}",
        ]
    )
